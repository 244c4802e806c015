"""Orders in which the codes of an image are read and written, by the name that `model/order=` has.

An order is a class and one line in ORDERS. Legend: b batch, i j code grid, n = i * j tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

Grid = tuple[int, int]


class Order(ABC):
    """A permutation of the places of a grid: grids of codes <-> tokens.

    `draws(grid)` is how many random numbers, uniform on [0, 1), an image's order takes: none,
    unless each sample has another. Then they are an argument of the rest, [b, draws].
    """

    def draws(self, grid: Grid) -> int:
        return 0

    @abstractmethod
    def places(
        self, grid: Grid, device: torch.device, draws: Float[Tensor, "b draws"] | None = None
    ) -> Int64[Tensor, "n"] | Int64[Tensor, "b n"]:
        """Return the place of the k-th token, counted row by row; [b, n] if each image has
        another order.

        It is made on the device: a copy to it would keep the host waiting.
        """

    def arrange(
        self, codes: Integer[Tensor, "b i j"], draws: Float[Tensor, "b draws"] | None = None
    ) -> Integer[Tensor, "b n"]:
        """Return the tokens of codes."""
        places = self.places((codes.shape[1], codes.shape[2]), codes.device, draws)
        return codes.flatten(1).gather(1, places.expand(len(codes), -1))

    def restore(
        self,
        tokens: Integer[Tensor, "b n"],
        grid: Grid,
        draws: Float[Tensor, "b draws"] | None = None,
    ) -> Integer[Tensor, "b i j"]:
        """Return the codes of tokens: the inverse of `arrange`."""
        token_at = self.places(grid, tokens.device, draws).argsort(-1)
        return tokens.gather(1, token_at.expand(len(tokens), -1)).unflatten(1, grid)


@dataclass
class Raster(Order):
    """Row by row, from the top left. Source: arXiv 2012.09841, section 3.2."""

    name: str = "raster"

    def places(
        self, grid: Grid, device: torch.device, draws: Float[Tensor, "b draws"] | None = None
    ) -> Int64[Tensor, "n"] | Int64[Tensor, "b n"]:
        return torch.arange(grid[0] * grid[1], device=device)

    def arrange(
        self, codes: Integer[Tensor, "b i j"], draws: Float[Tensor, "b draws"] | None = None
    ) -> Integer[Tensor, "b n"]:
        return codes.flatten(1)  # as they lie

    def restore(
        self,
        tokens: Integer[Tensor, "b n"],
        grid: Grid,
        draws: Float[Tensor, "b draws"] | None = None,
    ) -> Integer[Tensor, "b i j"]:
        return tokens.unflatten(1, grid)


# name in conf/model/order -> the order; the first is the default
ORDERS: dict[str, type[Order]] = {
    "raster": Raster,
}
