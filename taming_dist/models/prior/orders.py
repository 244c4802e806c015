"""Orders in which the codes of an image are read and written, by the name that `model/order=` has.

An order is a class and one line in ORDERS. Those of the original implementation (its permuters; the
paper compares them in its appendix) have its indices wherever it has any: it makes `z_curve`,
`subsample` and the spirals for square grids of a power of two only (spirals: of an even side), and
here they are defined for every grid. An order is one of the places of a grid; all levels of codes
at a place are written before the next place. Legend: b batch, i j code grid, p = i * j places, n
tokens, as many for each place as there are levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer, Shaped
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, ranged

Grid = tuple[int, int]
Places = Int64[Tensor, "p"] | Int64[Tensor, "b p"]


def is_code_shape(shape: Sequence[int]) -> bool:
    """Whether an image's codes may have a shape: (i, j), (levels, i, j), or (n,) of a sequence."""
    return 1 <= len(shape) <= 3


def grid_of(shape: Sequence[int]) -> Grid:
    """The grid [i, j] of the places of codes of a shape; of a sequence one row."""
    i, j = (1, *shape)[-2:]
    return i, j


def levels_of(shape: Sequence[int]) -> int:
    """How many codes there are at a place."""
    return shape[0] if len(shape) == 3 else 1


class Order(ABC):
    """A permutation of the places of a grid.

    `drawn`: in training each sample has an order of its own; validation and sampling have `places`.
    Learned positions are then those of the places, not of the sequence. `target_aware`: the
    transformer is told at each position the place of the token that it is to predict there.
    """

    name: str
    drawn: ClassVar[bool] = False
    target_aware: ClassVar[bool] = False

    @abstractmethod
    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        """Return the k-th place, counted row by row, on the CPU."""

    def draw(
        self, count: int, grid: Grid, progress: float, generator: torch.Generator
    ) -> Float[Tensor, "b p"] | None:
        """Return numbers for `count` samples whose ascending order is that of the places of each
        (`places_of`); None where all have `places`.

        `progress`: the share of training that is done, from 0 to 1. On the CPU, for a whole global
        batch, so that it does not depend on ranks or devices.
        """
        return None


def places_of(drawn: Float[Tensor, "b p"]) -> Int64[Tensor, "b p"]:
    """Return the k-th place of each sample from what its order has drawn."""
    return drawn.argsort(dim=-1, stable=True)  # ties are then broken alike everywhere


def arrange(codes: Shaped[Tensor, "b *shape"], places: Places) -> Shaped[Tensor, "b n"]:
    """Return the tokens of codes, or of what else has their shape: those of the k-th place in the
    order are the ones at places[k], level by level."""
    by_level = codes.reshape(len(codes), -1, places.shape[-1])
    index = places.expand(len(codes), -1).unsqueeze(1).expand(by_level.shape)
    return by_level.gather(2, index).transpose(1, 2).flatten(1)


def restore(
    tokens: Integer[Tensor, "b n"], shape: Sequence[int], places: Places
) -> Integer[Tensor, "b *shape"]:
    """Return the codes of tokens: the inverse of `arrange`."""
    by_level = tokens.unflatten(1, (places.shape[-1], -1)).transpose(1, 2)
    index = places.argsort(-1).expand(len(tokens), -1).unsqueeze(1).expand(by_level.shape)
    return by_level.gather(2, index).reshape(len(tokens), *shape)


@dataclass
class Raster(Order):
    """Row by row, from the top left. Source: arXiv 2012.09841, section 3.2."""

    name: str = "raster"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        return torch.arange(grid[0] * grid[1])


@dataclass
class Alternate(Order):
    """Row by row, every second row from right to left."""

    name: str = "alternate"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        rows = torch.arange(grid[0] * grid[1]).view(grid)
        rows[1::2] = rows[1::2].flip(1)
        return rows.flatten()


@dataclass
class ZCurve(Order):
    """Quarter by quarter, and so inside of each.

    That is by the Morton code of a place, in which the bits of its row and its column take turns.
    """

    name: str = "z_curve"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        return _interleaved(grid, range(_bits(grid))).argsort()


@dataclass
class Subsample(Order):
    """Coarse to fine: every second place of every second row first, and so inside of those.

    It is the Z-curve of rows and columns whose bits are read backwards.
    """

    name: str = "subsample"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        return _interleaved(grid, reversed(range(_bits(grid)))).argsort()


@dataclass
class SpiralIn(Order):
    """Inwards from the bottom right: up the right side, along the top to the left, and so on."""

    name: str = "spiral_in"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        rest, sides = torch.arange(grid[0] * grid[1]).view(grid), []
        while rest.numel():
            sides.append(rest[:, -1].flip(0))
            rest = rest[:, :-1].rot90(-1)  # the side that comes next is then the right one
        return torch.cat(sides)


@dataclass
class SpiralOut(Order):
    """Outwards from the middle: `SpiralIn` backwards."""

    name: str = "spiral_out"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        return SpiralIn().places(grid).flip(0)


@dataclass
class Random(Order):
    """One random permutation, the same for all images and runs."""

    name: str = "random"

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        # numpy keeps what RandomState draws the same in every version
        return torch.from_numpy(np.random.RandomState(1).permutation(grid[0] * grid[1])).long()


@dataclass
class RandomToRaster(Order):
    """A random order for each sample at first, row by row at last.

    A sample's order is random with a probability that is 1 up to the share `start` of training, 0
    from `end` on, and falls linearly between them. The transformer is told the place of what it is
    to predict. Source: RAR, arXiv 2411.00776, section 3.2; there `start` and `end` are epochs 200
    and 300 of 400.
    """

    start: float = ranged(0.5, at_least=0, at_most=1, may_change=True, compared=False)
    end: float = ranged(0.75, at_least=0, at_most=1, may_change=True, compared=False)
    name: str = "rar"
    drawn: ClassVar[bool] = True
    target_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, "model.order")
        if self.start > self.end:
            raise UserError(
                f"model.order.start={self.start} is after model.order.end={self.end}: use a "
                f"smaller start or a larger end"
            )

    def places(self, grid: Grid) -> Int64[Tensor, "p"]:
        return Raster().places(grid)

    def random_share(self, progress: float) -> float:
        """Return the probability of a random order when a share of training is done."""
        if progress < self.start:
            return 1.0
        return (self.end - progress) / (self.end - self.start) if progress < self.end else 0.0

    def draw(
        self, count: int, grid: Grid, progress: float, generator: torch.Generator
    ) -> Float[Tensor, "b p"] | None:
        share = self.random_share(progress)
        if share == 0:
            return None
        is_random = torch.rand(count, 1, generator=generator) < share
        drawn = torch.rand(count, grid[0] * grid[1], generator=generator)
        return torch.where(is_random, drawn, self.places(grid).float())


def _bits(grid: Grid) -> int:
    """How many bits the larger of the last row's and the last column's number has."""
    return (max(grid) - 1).bit_length()


def _interleaved(grid: Grid, bits: Iterable[int]) -> Int64[Tensor, "p"]:
    """The numbers that these bits of each place's row and column make, from the lowest on; of two
    at the same bit, the column's is the lower one."""
    rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None]
    numbers = torch.zeros(grid, dtype=torch.int64)
    for at, bit in enumerate(bits):
        numbers |= (rows >> bit & 1) << (2 * at + 1) | (columns >> bit & 1) << (2 * at)
    return numbers.flatten()


# name in conf/model/order -> the order; the first is the default
ORDERS: dict[str, type[Order]] = {
    "raster": Raster,
    "subsample": Subsample,
    "z_curve": ZCurve,
    "spiral_in": SpiralIn,
    "spiral_out": SpiralOut,
    "random": Random,
    "alternate": Alternate,
    "rar": RandomToRaster,
}
