"""Coordinates of crops against the map of all pixels that the original cuts and averages."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import CoordinatesCondition
from taming_dist.models.prior.conditions.coordinates import coordinates
from taming_dist.models.prior.conditions.crops import window_crops
from taming_dist.models.prior.window import Window

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])


def slow(
    image: tuple[int, int], corner: tuple[int, int], grid: tuple[int, int], factor: int, steps: int
) -> Tensor:
    """The map of an image [h, w], cut at a corner (down, across), averaged and rounded."""
    height, width = image
    places = torch.arange(height * width, dtype=torch.float64).view(image) / (height * width)
    down, across = corner
    cut = places[down : down + grid[0] * factor, across : across + grid[1] * factor]
    return (F.interpolate(cut[None, None], grid, mode="area")[0, 0] * steps).round().long()


@st.composite
def crops(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    """An image, the corner of a crop in it, the crop's grid, and its factor."""
    factor = draw(st.sampled_from([1, 2, 4, 16]))
    grid = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    sides = [codes * factor for codes in grid]
    image = tuple(side + draw(st.integers(0, 300)) for side in sides)
    corner = tuple(
        draw(st.integers(0, whole - side)) for whole, side in zip(image, sides, strict=True)
    )
    return (image[0], image[1]), (corner[0], corner[1]), grid, factor


@given(crops(), st.integers(1, 2000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_tokens_are_those_of_the_map_of_all_pixels(
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int], steps: int, mirrored: bool
) -> None:
    (height, width), (down, across), grid, factor = crop
    shares = [across / width, down / height, grid[1] * factor / width, grid[0] * factor / height]
    stored = torch.tensor([[*shares, float(mirrored)]])  # fp32, as code shards have them
    found = coordinates(stored, grid, factor, steps)[0]
    expected = slow((height, width), (down, across), grid, factor, steps)
    expected = expected.flip(-1) if mirrored else expected
    # Sums in another order may round a coordinate half way between two tokens to the other one.
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() <= 0.25
    assert 0 <= found.min() <= found.max() <= steps


def test_the_map_of_a_whole_image_of_256_pixels_ends_at_994() -> None:
    found = CoordinatesCondition(1024, [16, 16], 16).part(1, {})
    assert torch.equal(found, slow((256, 256), (0, 0), (16, 16), 16, 1024).view(1, -1))
    assert (int(found[0, 0]), int(found[0, -1])) == (30, 994)


def test_the_tokens_of_an_image_are_those_of_the_windows_that_it_is_made_of() -> None:
    whole = coordinates(WHOLE, (6, 8), 16, 1024)[0]
    for top, left in ((0, 0), (2, 3), (3, 4)):
        crop = window_crops(1, {}, Window(top, left, (3, 4), (6, 8)))
        assert torch.equal(
            coordinates(crop, (3, 4), 16, 1024)[0], whole[top : top + 3, left : left + 4]
        )


def test_images_so_large_that_they_need_a_row_that_there_is_not_are_refused() -> None:
    condition = CoordinatesCondition(steps=64, grid=[8, 8], factor=4, vocabulary=64)
    corner = torch.tensor([[0.95, 0.95, 0.05, 0.05, 0.0]])
    with pytest.raises(UserError, match="has the coordinate 64, but the transformer knows 0 to 63"):
        condition.part(1, {"crop": corner})
    assert CoordinatesCondition(64, [8, 8], 4).part(1, {"crop": corner}).max() == 64


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ([[0.5, 0, 0.6, 1, 0]], r"crop \[0.5, 0.0, 0.6\S*, 1.0\] reaches outside"),
        ([[0, -0.1, 0.6, 1, 0]], "reaches outside"),
        ([[0, 0, 0, 1, 0]], "reaches outside"),
        ([[0, 0, 1, float("nan"), 0]], "reaches outside"),
        ([[0, 0, 1, 1, 0]] * 2, r"1 images need crops \[1, 5\], not \[2, 5\]"),
        ([[0, 0, 1, 1]], r"not \[1, 4\]"),
    ],
)
def test_crops_that_are_none_are_refused(crop: list[list[float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CoordinatesCondition(8, [2, 2], 4).part(1, {"crop": torch.tensor(crop)})


def test_what_the_code_shards_have_to_say_is_named() -> None:
    with pytest.raises(UserError, match=r"grid=\[\] and model\.condition\.factor=0 describe no"):
        CoordinatesCondition().check()
