"""What is known of an image: the masks of regions, their order, their picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.errors import UserError
from taming_dist.generation.completion import (
    UNKNOWN,
    Known,
    first_codes,
    half,
    masked_picture,
    unseen,
    whole_codes,
)
from taming_dist.models.prior.orders import ORDERS

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def test_halves_are_those_of_the_picture() -> None:
    upper, left = half("upper", (5, 4)), half("left", (4, 5))
    assert upper.tolist() == [[True] * 4] * 2 + [[False] * 4] * 3
    assert torch.equal(half("lower", (5, 4)), upper.flip(0))
    assert torch.equal(left, half("upper", (5, 4)).T)
    assert torch.equal(half("right", (4, 5)), left.flip(1))
    assert torch.equal(half(0.5, (4, 4)), half("upper", (4, 4)))
    assert half(0.25, (8, 1)).sum() == 2


@pytest.mark.parametrize("keep", ["middle", 0, 1, -0.5, 2.0, ""])
def test_what_is_no_region_is_refused(keep: str | float) -> None:
    with pytest.raises(UserError, match=r"keep=.*: use upper, lower, left, right, or a share"):
        half(keep, (4, 4))


@given(GRIDS, st.sampled_from(sorted(ORDERS)), st.data())
@settings(max_examples=40, deadline=None)
def test_the_first_codes_are_first_in_the_order(
    grid: tuple[int, int], order: str, data: st.DataObject
) -> None:
    places = ORDERS[order]().places(grid)
    count = data.draw(st.integers(0, len(places)))
    mask = first_codes(count, grid, places)
    codes = torch.arange(len(places)).view(1, *grid)
    known = Known(codes, mask).tokens(ORDERS[order](), torch.device("cpu"))
    assert torch.equal(known.tokens[0], places)
    assert known.mask[0].tolist() == [True] * count + [False] * (len(places) - count)
    assert known.leading == count
    assert unseen(known.mask[0]) == 0


@given(GRIDS, st.sampled_from([1, 2, 4]), st.data())
@settings(max_examples=40, deadline=None)
def test_a_code_is_known_if_all_its_pixels_are_kept(
    grid: tuple[int, int], factor: int, data: st.DataObject
) -> None:
    height, width = (side * factor for side in grid)
    rows = st.lists(st.booleans(), min_size=width, max_size=width)
    kept = torch.tensor(data.draw(st.lists(rows, min_size=height, max_size=height)))
    kept[: factor * (grid[0] // 2)] = True
    expected = [
        [
            bool(kept[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].all())
            for j in range(grid[1])
        ]
        for i in range(grid[0])
    ]
    assert whole_codes(kept, factor).tolist() == expected


def test_known_codes_that_come_later_in_the_order_are_counted() -> None:
    mask = torch.tensor([True, False, True, True, False])
    assert (unseen(mask), unseen(mask[2:4]), unseen(~mask)) == (2, 0, 2)


def test_one_mask_serves_all_images_and_images_are_taken_in_turn() -> None:
    codes = torch.arange(8).view(2, 2, 2)
    known = Known(codes, half("upper", (2, 2)))
    assert known.mask.shape == codes.shape
    assert torch.equal(known.in_turn(5).codes, codes[[0, 1, 0, 1, 0]])
    with pytest.raises(UserError, match=r"known: a mask \[3, 2\] does not fit codes \[2, 2, 2\]"):
        Known(codes, half("upper", (3, 2)))


def test_what_is_known_of_no_image_is_refused() -> None:
    with pytest.raises(UserError, match="known: it is of no image"):
        Known(torch.zeros(0, 2, 2), torch.zeros(2, 2)).check((2, 2), 4)


def test_a_masked_picture_is_flat_where_nothing_is_known() -> None:
    picture = torch.rand(3, 8, 4)
    shown = masked_picture(picture, half("upper", (4, 2)))
    assert torch.equal(shown[:, :4], picture[:, :4])
    assert (shown[:, 4:] == UNKNOWN).all()
