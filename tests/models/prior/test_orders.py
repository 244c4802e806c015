"""Orders: a permutation of the grid and its inverse, fixed or drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from taming_dist.models.prior.orders import Grid, Order, Raster, arrange, places_of, restore


@dataclass
class Columns(Order):
    """Column by column."""

    name: str = "columns"

    def places(self, grid: Grid) -> Tensor:
        return torch.arange(grid[0] * grid[1]).view(grid).T.flatten()


CODES = torch.arange(24).view(2, 3, 4)


def test_raster_is_row_by_row() -> None:
    places = Raster().places((3, 4))
    tokens = arrange(CODES, places)
    assert tokens.tolist() == [list(range(12)), list(range(12, 24))]
    assert torch.equal(restore(tokens, (3, 4), places), CODES)
    assert Raster().draw(2, (3, 4), 0.0, torch.Generator()) is None


def test_a_fixed_order_reads_and_writes_its_places() -> None:
    places = Columns().places((3, 4))
    tokens = arrange(CODES, places)
    assert tokens[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(restore(tokens, (3, 4), places), CODES)


def test_a_drawn_order_is_another_for_each_sample_and_inverts_too() -> None:
    places = places_of(torch.rand(2, 12, generator=torch.Generator().manual_seed(0)))
    one, other = arrange(CODES % 12, places)
    assert one.tolist() != other.tolist()
    assert one.sort().values.tolist() == list(range(12))
    assert torch.equal(restore(arrange(CODES, places), (3, 4), places), CODES)
