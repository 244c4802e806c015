"""Windows of the conditions of images that are larger than what the transformer has learned."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.data.code_columns import BoxColumn
from taming_dist.errors import UserError
from taming_dist.formats.objects import Boxes, boxes_in_views
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    CoordinatesCondition,
    ObjectsCondition,
    SeveralConditions,
    Unconditional,
)
from taming_dist.models.prior.conditions.crops import window_crops
from taming_dist.models.prior.window import Window

Grid = tuple[int, int]


@st.composite
def windows(draw: st.DrawFn) -> Window:
    sides = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    image = sides[0] + draw(st.integers(0, 6)), sides[1] + draw(st.integers(0, 6))
    top, left = draw(st.integers(0, image[0] - sides[0])), draw(st.integers(0, image[1] - sides[1]))
    return Window(top, left, sides, image)


def cut(tokens: Tensor, window: Window) -> Tensor:
    """The tokens of a window from those of the images."""
    rows = slice(window.top, window.top + window.sides[0])
    across = slice(window.left, window.left + window.sides[1])
    return tokens.view(-1, *window.image)[:, rows, across].flatten(1)


@given(windows(), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_codes_are_cut_where_the_window_stands(window: Window, seed: int) -> None:
    small = CodesCondition(9, list(window.sides))
    large = small.enlarged(window.sides, window.image)
    codes = torch.randint(9, (2, *window.image), generator=torch.Generator().manual_seed(seed))
    found = small.part(2, small.window(2, {"cond": codes}, window))
    assert torch.equal(found, cut(large.part(2, {"cond": codes}), window))


def test_codes_of_another_grid_than_the_images_are_cut_in_proportion() -> None:
    small = CodesCondition(99, [2, 8])  # half as many rows, twice as many columns
    assert small.enlarged((4, 4), (6, 10)).grid == [3, 20]
    codes = torch.arange(60).view(1, 3, 20)
    for top, left, row, column in ((0, 0, 0, 0), (1, 3, 0, 6), (2, 6, 1, 12)):
        found = small.window(1, {"cond": codes}, Window(top, left, (4, 4), (6, 10)))["cond"]
        assert torch.equal(found, codes[:, row : row + 2, column : column + 8])
    with pytest.raises(UserError, match=r"size: 7 codes .* multiple of 2 codes"):
        small.enlarged((4, 4), (7, 10))


def test_codes_that_are_not_those_of_the_large_image_are_refused() -> None:
    large = CodesCondition(9, [4, 4]).enlarged((4, 4), (6, 10))
    with pytest.raises(UserError, match=r"2 images need codes of the grid \[6, 10\], not \[2, 4, "):
        large.part(2, {"cond": torch.zeros(2, 4, 4, dtype=torch.int64)})


@given(windows(), st.booleans(), st.booleans(), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_coordinates_of_a_window_are_those_of_its_place_in_the_image(
    window: Window, is_crop: bool, mirrored: bool, down: int, across: int
) -> None:
    small = CoordinatesCondition(4096, list(window.sides), 4)
    columns = {}
    if is_crop:  # the large image is itself a part of another
        height, width = (4 * side for side in window.image)
        whole = height + 9, width + 9
        crop = [across / whole[1], down / whole[0], width / whole[1], height / whole[0], mirrored]
        columns = {"crop": torch.tensor([crop] * 2, dtype=torch.float64)}
    expected = small.enlarged(window.sides, window.image).part(2, columns)
    assert torch.equal(small.part(2, small.window(2, columns, window)), cut(expected, window))


@given(st.integers(0, 4), st.integers(0, 2), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_objects_of_a_window_are_those_that_code_shards_have_of_the_same_crop(
    top: int, left: int, mirrored: bool, seed: int
) -> None:
    drawn = np.random.default_rng(seed)
    count = int(drawn.integers(0, 5))
    near, far = drawn.integers(0, 48, (count, 2)), drawn.integers(1, 17, (count, 2))
    places = np.concatenate([near, far], 1) / 64  # so that no sum is rounded
    classes, flags = np.arange(count, dtype=np.int32), np.zeros(count, np.uint8)
    objects = Boxes(places, classes, flags, np.array([count]))

    def columns(crop: Tensor) -> dict[str, Tensor]:
        seen = boxes_in_views([objects], crop[None].numpy())
        return BoxColumn("").tensors("boxes", seen) | {"crop": crop}

    condition = ObjectsCondition(categories=5, vocabulary=40_000, objects=4)
    window = Window(top, left, (4, 2), (8, 4))
    large = columns(torch.tensor([[0.125, 0.25, 0.5, 0.5, mirrored]], dtype=torch.float64))
    expected = columns(window_crops(1, large, window))
    found = condition.window(1, large, window)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(found[name])) for name in found)


def test_what_is_the_same_everywhere_in_an_image_is_not_cut() -> None:
    window, columns = Window(2, 2, (4, 4), (6, 10)), {"cls": torch.tensor([1, 0])}
    for condition in (Unconditional(), ClassCondition(3), SeveralConditions([ClassCondition(3)])):
        assert condition.enlarged(window.sides, window.image) == condition
        assert condition.window(2, columns, window) is columns


def test_of_several_each_is_cut_in_its_own_way() -> None:
    window = Window(2, 3, (4, 4), (6, 10))
    codes, places = CodesCondition(9, [4, 4]), CoordinatesCondition(50, [4, 4], 2)
    several = SeveralConditions([ClassCondition(3), codes, places])
    columns = {"cls": torch.tensor([2]), "cond": torch.randint(9, (1, 6, 10))}
    found = several.prefix(1, several.window(1, columns, window)).parts
    assert torch.equal(found[0], torch.tensor([[2]]))
    assert torch.equal(found[1], codes.part(1, codes.window(1, columns, window)))
    assert torch.equal(found[2], places.part(1, places.window(1, columns, window)))
    large = several.enlarged(window.sides, window.image).prefix(1, columns).parts
    assert torch.equal(found[1], cut(large[1], window))
    assert torch.equal(found[2], cut(large[2], window))
