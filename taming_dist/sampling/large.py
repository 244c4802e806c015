"""Images larger than what the transformer has learned, which take long: they can be continued."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from taming_dist.generation.completion import Known, Watch
from taming_dist.generation.generator import Generator
from taming_dist.generation.pictures import to_uint8
from taming_dist.generation.placement import Placement
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import Columns
from taming_dist.sampling.units import Unit


@dataclass(frozen=True)
class Large:
    """How they are written: where the window stands, how many windows are read at a time, the GiB
    that they may keep, and the rows of pixels that are decoded at a time (`tiles.tile_rows`)."""

    placement: Placement
    batch: int
    memory: float
    tile: int | None = None

    @property
    def images(self) -> int:
        """How many images together have `batch` codes that can be chosen at the same time."""
        return max(1, self.batch // self.placement.widest)

    def codes(
        self,
        generator: Generator,
        columns: Columns,
        sampling: Sampling,
        seed: int,
        unit: Unit,
        known: Known | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Return the codes [b, i, j] of a unit's images, of which something may be `known`, under
        the eyes of `watch`.

        The unit keeps them while they are written and when they are complete, since they are still
        to be decoded, and has those that it was stopped with.
        """
        known = self._resumed(unit) or known
        steps = self.steps(generator, columns, sampling, seed, unit.images, known)
        try:
            for known in steps:
                unit.keep(float(known.mask.float().mean()), partial(state_of, known))
                if watch is not None:
                    watch(partial(itself, known))
        finally:
            if known is not None:
                unit.save(state_of(known))
        assert known is not None
        return known.codes

    def strips(self, generator: Generator, codes: Tensor, unit: Unit) -> Iterator[Tensor]:
        """Yield the picture of a unit's codes [i, j] in strips uint8 [3, n, w], on the CPU."""
        for tile in generator.tiles(codes, self.tile, unit.folder):
            yield to_uint8(tile).cpu()

    def steps(
        self,
        generator: Generator,
        columns: Columns,
        sampling: Sampling,
        seed: int,
        images: range,
        known: Known | None,
    ) -> Iterator[Known]:
        """Yield what is known of some of a seed's images, more and more.

        Raises:
            UserError: a condition or setting that the models cannot serve; before the first code.
        """
        if known is None:
            known = Known.nothing(len(images), self.placement.image)
        return generator.windows(
            columns, known, self.placement, sampling, seed, self.batch, self.memory, images.start
        )

    def _resumed(self, unit: Unit) -> Known | None:
        state, count = unit.resumed(), len(unit.images)
        shape = torch.Size([count, *self.placement.image])
        if {name: tensor.shape for name, tensor in state.items()} == dict(codes=shape, mask=shape):
            return Known(state["codes"], state["mask"])
        return None


def itself(known: Known) -> Known:
    """What is known: it does not change any more."""
    return known


def state_of(known: Known) -> Mapping[str, Tensor]:
    """What is kept of an unfinished unit, tensors by name."""
    return {"codes": known.codes, "mask": known.mask}
