"""FID and its kin within a run: of what the model makes for the validation set, against that set.

They are figures of `taming_dist.evaluation.distribution`, of as many images as validation has: they
compare within a run, and with runs that are validated on the same images.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.distribution import LEAST, distances
from taming_dist.evaluation.features import Features
from taming_dist.evaluation.reference import Reference, open_reference
from taming_dist.evaluation.sources import Intake
from taming_dist.inception import Inception, inception
from taming_dist.training.recipe import Measured, Pictures
from taming_dist.training.watchdog import Progress

if TYPE_CHECKING:
    from taming_dist.training.run import Data, LoopConfig


@dataclass(frozen=True)
class Distances:
    """What the pictures of a run are compared by: features of `network`. The figures are called
    `prefix`fid and so on; `reference` takes the place of the validation set's pictures."""

    network: Inception
    prefix: str = ""
    reference: Reference | None = None

    def measure(self, pictures: Iterable[Pictures], world: World, progress: Progress) -> Measured:
        """The figures, and the `seconds` that they took (collective)."""
        began = time.monotonic()
        made, real = Features(self.network), Features(self.network)
        for some in pictures:
            made.add(some.made, some.ids)
            if self.reference is None:
                real.add(some.real, some.ids)
        progress.begin("comparing images")
        sets = made.gathered(world), real.gathered(world)
        found = self._between(*sets) if world.is_first else {}
        named = {f"{self.prefix}{name}": value for name, value in found.items()}
        return world.broadcast(named | {"seconds": time.monotonic() - began})

    def _between(self, made: Tensor, real: Tensor) -> dict[str, float]:
        """The distances of features [n, d + s] from those of the reference, or [n, d + s]."""
        own, _ = self.network.parted(made)
        others: Tensor | None = real
        statistics = None
        if self.reference is not None:
            others, statistics = self.reference.features, self.reference.statistics
        compared = None if others is None else self.network.parted(others)[0]
        return distances(own, compared, statistics)


def open_distances(
    config: "LoopConfig", data: "Data", world: World, prefix: str = "", size: int | None = None
) -> Distances:
    """What `config` asks for, on the rank's device; images of a reference are cut to `size` pixels
    (collective).

    Raises:
        UserError: the network or the reference is not there, or there are too few images.
    """
    images = data.val.plan.num_evaluated
    if images < LEAST:
        raise UserError(
            f"train.evaluate_every: {images} images of data.val are validated, which are too few "
            f"to be compared, use {LEAST} or more (train.validate_images)"
        )
    network = inception(config.evaluate_features).to(world.device)
    if config.evaluate_reference is None:
        return Distances(network, prefix)
    intake = Intake(data.val.plan.micro_batch, size)
    asked, key = config.evaluate_reference, "train.evaluate_reference"
    return Distances(network, prefix, open_reference(asked, network, intake, world, key))
