"""Orders in which the codes of an image are read and written, by the name that `model/order=` has.

An order is a class and one line in ORDERS. Legend: b batch, i j code grid, n = i * j tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

Grid = tuple[int, int]
Places = Int64[Tensor, "n"] | Int64[Tensor, "b n"]


class Order(ABC):
    """A permutation of the places of a grid.

    `drawn`: in training each sample has an order of its own; validation and sampling have `places`.
    Learned positions are then those of the places, not of the sequence. `target_aware`: the
    transformer is told at each position the place of the token that it is to predict there.
    """

    drawn: ClassVar[bool] = False
    target_aware: ClassVar[bool] = False

    @abstractmethod
    def places(self, grid: Grid) -> Int64[Tensor, "n"]:
        """Return the place of the k-th token, counted row by row, on the CPU."""

    def draw(
        self, count: int, grid: Grid, progress: float, generator: torch.Generator
    ) -> Float[Tensor, "b n"] | None:
        """Return numbers for `count` samples whose ascending order is that of the places of each
        (`places_of`); None where all have `places`.

        `progress`: the share of training that is done, from 0 to 1. On the CPU, for a whole global
        batch, so that it does not depend on ranks or devices.
        """
        return None


def places_of(drawn: Float[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
    """Return the place of the k-th token of each sample from what its order has drawn."""
    return drawn.argsort(-1)


def arrange(codes: Integer[Tensor, "b i j"], places: Places) -> Integer[Tensor, "b n"]:
    """Return the tokens of codes whose k-th token has the place places[k]."""
    return codes.flatten(1).gather(1, places.expand(len(codes), -1))


def restore(tokens: Integer[Tensor, "b n"], grid: Grid, places: Places) -> Integer[Tensor, "b i j"]:
    """Return the codes of tokens: the inverse of `arrange`."""
    token_at = places.argsort(-1)
    return tokens.gather(1, token_at.expand(len(tokens), -1)).unflatten(1, grid)


@dataclass
class Raster(Order):
    """Row by row, from the top left. Source: arXiv 2012.09841, section 3.2."""

    name: str = "raster"

    def places(self, grid: Grid) -> Int64[Tensor, "n"]:
        return torch.arange(grid[0] * grid[1])


# name in conf/model/order -> the order; the first is the default
ORDERS: dict[str, type[Order]] = {
    "raster": Raster,
}
