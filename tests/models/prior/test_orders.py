"""Orders: a permutation of the grid and its inverse, fixed or drawn."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from taming_dist.models.prior.orders import Grid, Order, Raster


@dataclass
class Columns(Order):
    """Column by column."""

    name: str = "columns"

    def places(self, grid: Grid, device: torch.device, draws: Tensor | None = None) -> Tensor:
        return torch.arange(grid[0] * grid[1], device=device).view(grid).T.flatten()


@dataclass
class Random(Order):
    """Another for each sample."""

    name: str = "random"

    def draws(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def places(self, grid: Grid, device: torch.device, draws: Tensor | None = None) -> Tensor:
        assert draws is not None
        return draws.argsort(1)


CODES = torch.arange(24).view(2, 3, 4)


def test_raster_is_row_by_row_and_nothing_is_copied() -> None:
    tokens = Raster().arrange(CODES)
    assert tokens.tolist() == [list(range(12)), list(range(12, 24))]
    assert tokens.data_ptr() == CODES.data_ptr()
    assert torch.equal(Raster().restore(tokens, (3, 4)), CODES)
    assert torch.equal(Order.arrange(Raster(), CODES), tokens)  # what its shortcut stands for
    assert torch.equal(Order.restore(Raster(), tokens, (3, 4)), CODES)


def test_a_fixed_order_reads_and_writes_its_places() -> None:
    tokens = Columns().arrange(CODES)
    assert tokens[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(Columns().restore(tokens, (3, 4)), CODES)


@pytest.mark.parametrize("order", [Raster(), Columns(), Random()])
def test_restoring_is_the_inverse_of_arranging(order: Order) -> None:
    draws = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    tokens = order.arrange(CODES, draws)
    assert tokens.sort(1).values.tolist() == CODES.flatten(1).tolist()
    assert torch.equal(order.restore(tokens, (3, 4), draws), CODES)


def test_a_drawn_order_is_another_for_each_sample() -> None:
    draws = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    one, other = Random().arrange(CODES % 12, draws)
    assert one.tolist() != other.tolist()
