"""FID and its kin within a run: of what the model makes for the validation set, against that set.

They are figures of `taming_dist.evaluation.distribution`, of as many images as validation has: they
compare within a run, and with runs that are validated on the same images.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.distribution import LEAST, distances
from taming_dist.evaluation.features import Features, gathered
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
    `prefix`fid and so on; `reference` takes the place of the validation set's pictures.

    The validation set's pictures are always the same, so what `known` has of them is found at the
    first measurement of a process and kept: this rank's features fp32 [b, d] on the CPU (8 KiB of a
    picture), by the ids of a batch. What another batch sees, where an image could be read this time
    and not then, is found anew: the figures never depend on what is kept.
    """

    network: Inception
    prefix: str = ""
    reference: Reference | None = None
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def measure(self, pictures: Iterable[Pictures], world: World, progress: Progress) -> Measured:
        """The figures, and the `seconds` that they took (collective)."""
        began = time.monotonic()
        made = Features(self.network, self.network.dim)
        seen: dict[tuple[int, ...], Tensor] = {}
        for some in pictures:
            made.add(some.made, some.ids)
            if self.reference is None:
                ids = tuple(some.ids.tolist())
                known = self.known.get(ids)
                seen[ids] = self.network(some.real()).cpu() if known is None else known
        progress.begin("comparing images")
        self.known.clear()
        self.known.update(seen)
        real = gathered(map(torch.tensor, seen), seen.values(), made.dim, world)
        sets = made.gathered(world), real
        found = self._between(*sets) if world.is_first else {}
        named = {f"{self.prefix}{name}": value for name, value in found.items()}
        return world.broadcast(named | {"seconds": time.monotonic() - began})

    def _between(self, made: Tensor, real: Tensor) -> dict[str, float]:
        """The distances of features [n, d] from those of the reference, or [n, d]."""
        others: Tensor | None = real
        statistics = None
        if self.reference is not None:
            others, statistics = self.reference.features, self.reference.statistics
            others = None if others is None else self.network.parted(others)[0]
        return distances(made, others, statistics)


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
