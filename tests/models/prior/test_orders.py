"""Orders: permutations of any grid and their inverses, fixed or drawn; the original's where it has
them."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.orders import (
    ORDERS,
    Order,
    RandomToRaster,
    SpiralIn,
    SpiralOut,
    Subsample,
    ZCurve,
    arrange,
    places_of,
    restore,
)

# of the original implementation's permuters on 16 x 16: sha256 of the indices, little-endian int64
ORIGINAL = {
    "raster": "bbd330b12e8159e117376ef24fa106413bc9fc18032a0d43e95c5dae5e47953f",
    "subsample": "05a257279a41a6425795929f5f0a4bd127e9c021738c07310090e14b93c2b7f3",
    "z_curve": "d5ddc8b3b9fcca4a09a561129fba26e965036b4866c99ed9c59e1cea840aa256",
    "spiral_in": "9cb0004aaddfad004dab999a9192082c41f064f38f7dd847b3046d05abd4c782",
    "spiral_out": "dd4e8ceb13b3cce06c17407d26a6cf321da6be99d4e562d654673f58fb85714b",
    "random": "628bea093fc954477260fc21ea105ca10b5bb70341ce78a8fd590cb3a871ac3a",
    "alternate": "8303bab0752f727cec1a7d7ac1fe8f816d18a6d2407d3404b27d13c0e438c4f0",
}
FIXED = sorted(ORIGINAL)
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def drawn(order: Order, count: int, progress: float, seed: int = 0) -> Tensor | None:
    return order.draw(count, (3, 4), progress, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FIXED)
def test_the_originals_orders_have_its_indices(name: str) -> None:
    places = ORDERS[name]().places((16, 16))
    assert hashlib.sha256(places.numpy().astype("<i8").tobytes()).hexdigest() == ORIGINAL[name]


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS, name=st.sampled_from(sorted(ORDERS)))
def test_every_order_is_a_permutation_of_every_grid_and_inverts(
    grid: tuple[int, int], name: str
) -> None:
    count = grid[0] * grid[1]
    places = ORDERS[name]().places(grid)
    assert sorted(places.tolist()) == list(range(count))
    codes = torch.arange(2 * count).view(2, *grid)
    tokens = arrange(codes, places)
    assert tokens[1].tolist() == [codes[1].flatten()[place] for place in places]
    assert torch.equal(restore(tokens, grid, places), codes)


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS)
def test_the_curves_sort_places_by_the_bits_of_row_and_column_in_turn(
    grid: tuple[int, int],
) -> None:
    def in_turn(place: int, step: int) -> str:
        row, column = (f"{number:04b}"[::step] for number in divmod(place, grid[1]))
        return "".join(map("".join, zip(row, column, strict=True)))

    for order, step in ((ZCurve(), 1), (Subsample(), -1)):
        expected = sorted(range(grid[0] * grid[1]), key=lambda place: in_turn(place, step))  # noqa: B023
        assert order.places(grid).tolist() == expected


def test_a_spiral_walks_along_the_sides_from_neighbour_to_neighbour() -> None:
    inwards = SpiralIn().places((3, 4)).tolist()
    assert inwards == [11, 7, 3, 2, 1, 0, 4, 8, 9, 10, 6, 5]
    assert SpiralOut().places((3, 4)).tolist() == inwards[::-1]


def test_a_drawn_order_is_another_for_each_sample_and_inverts_too() -> None:
    codes = torch.arange(12).view(1, 3, 4).repeat(2, 1, 1)
    found = drawn(RandomToRaster(), 2, 0.0)
    assert found is not None
    places = places_of(found)
    one, other = arrange(codes, places)
    assert one.tolist() != other.tolist()
    assert one.sort().values.tolist() == list(range(12))
    assert torch.equal(restore(arrange(codes, places), (3, 4), places), codes)


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1.0), (0.49, 1.0), (0.55, 0.8), (0.7, 0.2), (0.75, 0.0), (1.0, 0)]
)
def test_random_orders_become_raster_linearly_between_two_shares_of_training(
    progress: float, share: float
) -> None:
    order = RandomToRaster()
    assert order.random_share(progress) == pytest.approx(share)
    found = drawn(order, 4000, progress)
    if found is None:
        assert share == 0  # all have the order that sampling has
        return
    raster = torch.arange(12)
    random = (places_of(found) != raster).any(1).double().mean().item()
    assert random == pytest.approx(share, abs=0.03)


def test_random_orders_have_every_place_first_alike() -> None:
    found = drawn(RandomToRaster(start=1.0, end=1.0), 6000, 0.9)
    assert found is not None
    shares = places_of(found)[:, 0].bincount(minlength=12) / 6000
    assert torch.allclose(shares, torch.full((12,), 1 / 12), atol=0.015)


def test_random_orders_may_end_at_once_but_not_before_they_have_become_rare() -> None:
    assert RandomToRaster(0.5, 0.5).random_share(0.5) == 0
    with pytest.raises(
        UserError, match=r"model\.order\.start=0\.8 is after model\.order\.end=0\.6"
    ):
        RandomToRaster(0.8, 0.6)
    with pytest.raises(UserError, match=r"model\.order\.end=1\.5"):
        RandomToRaster(end=1.5)
