"""How the global batch is divided into micro-batches of each rank."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, ranged


@dataclass(frozen=True)
class BatchSizes:
    """`global_batch` images per optimizer step are `world_size` ranks x `accumulation`
    micro-batches x `micro_batch` images."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int


@dataclass
class DataConfig:
    """What the `data` group of every stage has.

    `train`, `val`: specs of shards. `global_batch`: images (or the codes of images) per optimizer
    step over all ranks; `micro_batch`: the most of them per rank and forward pass; `lanes` and
    `block`: see `taming_dist.data.order`.
    """

    train: Any = MISSING
    val: Any = MISSING
    global_batch: int = ranged(MISSING, at_least=1)
    micro_batch: int = ranged(MISSING, at_least=1)
    lanes: int = ranged(256, at_least=1)
    block: int = ranged(256, at_least=1)

    def __post_init__(self) -> None:
        check_ranges(self, "data")

    @property
    def has_order(self) -> bool:
        """Whether samples come in the order of `lanes`, which the ranks share."""
        return True

    def batch_sizes(self, world_size: int) -> BatchSizes:
        """The cut of the global batch over so many ranks.

        Raises:
            UserError: the ranks cannot share the global batch or the lanes equally.
        """
        sizes = batch_sizes(self.global_batch, self.micro_batch, world_size)
        if self.has_order:
            check_shared("data.lanes", self.lanes, world_size)
        return sizes


def batch_sizes(global_batch: int, largest: int, world_size: int) -> BatchSizes:
    """Choose the largest equal micro-batches of at most `largest` images (data.micro_batch).

    Raises:
        UserError: unless the global batch is a multiple of the number of ranks.
    """
    check_shared("data.global_batch", global_batch, world_size)
    per_rank = global_batch // world_size
    fitting = (size for size in range(min(largest, per_rank), 0, -1) if per_rank % size == 0)
    micro_batch = next(fitting)
    return BatchSizes(global_batch, world_size, micro_batch, per_rank // micro_batch)


def check_shared(key: str, value: int, world_size: int) -> None:
    """Raise `UserError` naming `key` and the nearest valid values unless `value` is a multiple of
    the number of ranks."""
    if value % world_size:
        below = value // world_size * world_size
        nearest = " or ".join(f"{key}={fit}" for fit in (below, below + world_size) if fit)
        raise UserError(
            f"{key}={value} is not a multiple of the number of ranks, {world_size}: use {nearest}"
        )
