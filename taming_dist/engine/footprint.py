"""What a rank holds of a network while it trains: bytes by use, counted before anything is made.

Weights, gradients and Adam's moments are fp32 at any precision (autocast). The counts are those of
DeepSpeed as it is set here, not of arXiv 1910.02054, table 1: see docs/speed.md, "Memory".
"""

import dataclasses
from collections.abc import Sequence

from taming_dist.engine.settings import BUCKET, EngineConfig

FP32 = 4  # bytes
MOMENTS = 2  # of Adam


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one rank in the middle of an optimizer step, when it holds most: on its device, and
    `host` in the memory of its host."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    buckets: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        """Everything on the device."""
        return sum(dataclasses.astuple(self)) - self.host

    def __add__(self, other: "Footprint") -> "Footprint":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Footprint(*(one + two for one, two in pairs))


def footprint(
    sizes: Sequence[int], engine: EngineConfig, ranks: int, averaged: bool = False
) -> Footprint:
    """Return what each of `ranks` ranks holds of a network whose trained parameters have `sizes`
    elements; `averaged`: a moving average of its weights is kept.

    ZeRO 1 and 2 cut the optimizer up, 2 also the gradients, 3 also the weights, but for those of
    fewer than `persist_below` elements, which stay whole beside. From 1 on the optimizer has a copy
    of its share of the weights. ZeRO 0 reduces without a bucket of its own, ZeRO 2 gives its back.
    `offload` has optimizer and average on the host; gradients count for the device, also where
    DeepSpeed moves its share of them.
    """
    everything = float(FP32 * sum(sizes))
    share, zero = everything / ranks, engine.zero
    small = FP32 * sum(size for size in sizes if size < engine.persist_below)
    moved = everything if zero == 0 else share
    found = Footprint(
        weights=everything if zero < 3 else share + (small if ranks > 1 else 0),
        gradients=everything if zero < 2 else share,
        optimizer=MOMENTS * moved + (0 if zero == 0 else share),
        average=moved if averaged else 0.0,
        buckets=FP32 * BUCKET if zero in (1, 3) else 0.0,
    )
    if engine.offload == "none":
        return found
    host = found.optimizer + found.average
    return dataclasses.replace(found, optimizer=0.0, average=0.0, host=host)
