"""Objects as tokens, against a slow version that takes one object at a time, and back."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.data.code_columns import BoxColumn
from taming_dist.errors import UserError
from taming_dist.formats.objects import FLAGS, Boxes, boxes_in_views
from taming_dist.models.prior.conditions import ObjectCentersCondition, ObjectsCondition
from taming_dist.models.prior.conditions.layouts import STORED_FLAGS
from taming_dist.models.prior.conditions.objects import ORDER

share = st.integers(0, 2**20).map(lambda number: number / 2**20)  # exact in fp32


@st.composite
def boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    (left, right), (top, bottom) = (
        sorted([draw(share), draw(share)]),
        sorted([draw(share), draw(share)]),
    )
    return left, top, right - left, bottom - top


@st.composite
def views(draw: st.DrawFn) -> tuple[list[tuple[int, int, Any]], tuple[float, ...]]:
    """A view's objects (category, flags, box), and its crop."""
    placed = st.tuples(st.integers(0, 4), st.integers(0, 31), boxes())
    crop = draw(boxes().filter(lambda box: box[2] > 0 and box[3] > 0))
    return draw(st.lists(placed, max_size=6)), (*crop, float(draw(st.booleans())))


def columns_of(given_views: list[Any]) -> dict[str, Tensor]:
    objects = [each for placed, _ in given_views for each in placed]
    return {
        "boxes": torch.tensor([box for _, _, box in objects]).view(-1, 4),
        "box_class": torch.tensor([category for category, _, _ in objects], dtype=torch.int64),
        "box_flags": torch.tensor([flags for _, flags, _ in objects], dtype=torch.int64),
        "box_ends": torch.tensor([len(placed) for placed, _ in given_views]).cumsum(0),
        "crop": torch.tensor([crop for _, crop in given_views]),
    }


def slow(condition: ObjectsCondition, placed: list[Any], crop: tuple[float, ...]) -> list[int]:
    """The tokens of one view, one object at a time."""
    sections = int(condition.vocabulary**0.5)

    def cell(x: float, y: float) -> int:
        return round(y * (sections - 1)) * sections + round(x * (sections - 1))

    left, top, width, height, mirrored = crop
    left = 1 - left - width if mirrored else left
    tokens: list[int] = []
    for category, stored, (x, y, w, h) in placed[: condition.objects]:
        holds = {flag for bit, flag in enumerate(FLAGS) if stored >> bit & 1}
        bits = [
            bit for bit, flag in enumerate(("group", "occluded", "depiction", "inside"))
            if flag in holds & set(condition.flags)
        ]  # fmt: skip
        tokens.append(category + condition.categories * sum(2**bit for bit in bits))
        x, y, w, h = left + x * width, top + y * height, w * width, h * height
        if condition.tokens_each == 2:
            tokens.append(cell(x + w / 2, y + h / 2))
        else:
            tokens += [cell(x, y), cell(x + w, y + h)]
    missing = condition.objects * condition.tokens_each - len(tokens)
    tokens += [condition.vocabulary - 1] * missing
    return [*tokens, cell(left, top), cell(left + width, top + height)]


KINDS = [ObjectsCondition, ObjectCentersCondition]


def small(kind: type[ObjectsCondition]) -> ObjectsCondition:
    return kind(categories=5, vocabulary=200, objects=4, flags=["group", "depiction"])


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(views(), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_tokens_are_those_of_one_object_at_a_time(
    kind: type[ObjectsCondition], given_views: list[Any]
) -> None:
    condition = small(kind)
    condition.check()
    seen = [
        ([each for each in placed if each[2][2] * each[2][3] > 0], c) for placed, c in given_views
    ]
    found = condition.part(len(given_views), columns_of(given_views))
    assert found.tolist() == [slow(condition, *view) for view in seen]
    assert found.shape == (len(given_views), condition.length)
    assert 0 <= found.min() <= found.max() < condition.vocabulary


@pytest.mark.parametrize("kind", KINDS)
@given(views())
@settings(max_examples=40, deadline=None)
def test_a_layout_is_what_its_tokens_were_made_of_up_to_a_cell(
    kind: type[ObjectsCondition], view: Any
) -> None:
    condition = small(kind)
    placed, crop = view
    placed = [each for each in placed if each[2][2] * each[2][3] > 0][: condition.objects]
    (tokens,) = condition.part(1, columns_of([(placed, (*crop[:4], 0.0))]))
    layout = condition.layout(tokens)
    half = 0.5 / (int(condition.vocabulary**0.5) - 1) + 1e-9
    assert [each.category for each in layout.objects] == [category for category, _, _ in placed]
    for said, (_, stored, (x, y, w, h)) in zip(layout.objects, placed, strict=True):
        assert said.flags == tuple(
            flag for flag, bit in (("group", 1), ("depiction", 8)) if stored & bit
        )
        left, top = crop[0] + x * crop[2], crop[1] + y * crop[3]
        width, height = w * crop[2], h * crop[3]
        if condition.tokens_each == 2:
            left, top, width, height = left + width / 2, top + height / 2, 0, 0
        corners = [left, top, left + width, top + height]
        found = [*said.box[:2], said.box[0] + said.box[2], said.box[1] + said.box[3]]
        assert found == pytest.approx(corners, abs=half)
    # what a layout says has the same tokens again
    again = columns_of([([(o.category, 0, o.box) for o in layout.objects], (0, 0, 1, 1, 0))])
    if kind is ObjectsCondition and all(o.box[2] * o.box[3] > 0 for o in layout.objects):
        assert torch.equal(condition.part(1, again)[0, :-2].view(-1, 3)[:, 1:],
                           tokens[:-2].view(-1, 3)[:, 1:])  # fmt: skip


@st.composite
def images(draw: st.DrawFn) -> tuple[tuple[float, ...], list[tuple[int, ...]]]:
    """A crop of an image, and boxes in it, in 64ths of the image, so that no sum is rounded."""
    side = draw(st.sampled_from([16, 32, 64]))
    left, top = draw(st.integers(0, 64 - side)), draw(st.integers(0, 64 - side))
    found = []
    for _ in range(draw(st.integers(0, 4))):
        x, y = draw(st.integers(left, left + side - 1)), draw(st.integers(top, top + side - 1))
        w, h = draw(st.integers(1, left + side - x)), draw(st.integers(1, top + side - y))
        found.append((x, y, w, h))
    return (left, top, side, side, float(draw(st.booleans()))), found


@given(images())
@settings(max_examples=40, deadline=None)
def test_objects_inside_of_their_crop_stand_where_the_original_places_them_in_the_image(
    image: tuple[tuple[float, ...], list[tuple[int, ...]]],
) -> None:
    """From an image's json through code shards: the original flips boxes and crop of the image."""
    (left, top, width, height, mirrored), written = image
    crop = np.array([left / 64, top / 64, width / 64, height / 64, mirrored])
    places = np.array(written, np.float64).reshape(-1, 4) / 64
    count = len(written)
    known = Boxes(places, np.arange(count, dtype=np.int32), np.zeros(count, np.uint8),
                  np.array([count]))  # fmt: skip
    stored = boxes_in_views([known], crop[None, None])
    columns = BoxColumn("").tensors("boxes", stored) | {"crop": torch.tensor(crop)[None].float()}
    condition = small(ObjectsCondition)

    def corners(x: float, y: float, w: float, h: float) -> list[int]:
        x = 64 - x - w if mirrored else x
        sections = 14  # of 200 tokens
        points = ((x, y), (x + w, y + h))
        cells = [[round(side / 64 * (sections - 1)) for side in point] for point in points]
        return [across + down * sections for across, down in cells]

    expected = [[number, *corners(*box)] for number, box in enumerate(written)]
    tokens = condition.part(1, columns)[0].tolist()
    assert tokens[: 3 * count] == [token for each in expected for token in each]
    assert tokens[-2:] == corners(left, top, width, height)


def test_thirty_objects_make_92_tokens_and_62_with_centres() -> None:
    assert (ObjectsCondition(80).length, ObjectCentersCondition(80).length) == (92, 62)
    assert ObjectsCondition(80).nothing == 8191


def test_in_training_objects_are_shuffled_by_draws_that_do_not_depend_on_the_rank() -> None:
    condition = small(ObjectsCondition)
    placed = [(k, 0, (k / 8, 0.0, 0.125, 0.5)) for k in range(5)]
    columns = columns_of([(placed, (0, 0, 1, 1, 0)), (placed[:2], (0, 0, 1, 1, 0))])
    plain = condition.part(2, columns)[:, :-2].view(2, 4, 3)
    assert plain[:, :, 0].tolist() == [[0, 1, 2, 3], [0, 1, 199, 199]]
    draws = condition.draw(2, torch.Generator().manual_seed(0))
    assert draws[ORDER].shape == (2, 4)
    order = {ORDER: torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.9, 0.1, 0.0, 0.05]])}
    found = condition.part(2, columns | order)
    assert found[:, :-2].view(2, 4, 3)[:, :, 0].tolist() == [[1, 3, 2, 0], [1, 0, 199, 199]]
    assert torch.equal(found[0, :-2].view(4, 3).sort(0).values, plain[0].sort(0).values)


def test_objects_of_at_most_the_least_area_are_left_out() -> None:
    condition = ObjectsCondition(5, vocabulary=200, objects=4, min_area=0.01)
    placed = [(0, 0, (0, 0, 0.1, 0.1)), (1, 0, (0, 0, 0.5, 0.5)), (2, 0, (0, 0, 0.15, 0.15))]
    whole, half = (0, 0, 1, 1, 0), (0, 0, 0.5, 0.5, 0)
    found = condition.part(2, columns_of([(placed, whole), (placed, half)]))
    kept = found[:, :-2].view(2, 4, 3)[:, :, 0]
    # 0.1 in fp32 is a little more than that
    assert kept.tolist() == [[0, 1, 2, 199], [1, 199, 199, 199]]


def test_flags_are_counted_as_code_shards_store_them() -> None:
    assert STORED_FLAGS == FLAGS


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"model\.condition\.categories: 0 is too few for model/condition=objects"),
        ({"categories": 100, "vocabulary": 200}, r"vocabulary: 200 .* give at least 201"),
    ],
)
def test_keys_that_describe_no_objects_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectsCondition(**keys).check()
    with pytest.raises(UserError, match=r"model\.condition\.flags: grup: use group, occluded"):
        ObjectsCondition(flags=["grup"])


def layout(*objects: dict[str, Any]) -> dict[str, Any]:
    return {"objects": list(objects)}


def one(**changes: Any) -> dict[str, Any]:
    return {"category": 3, "box": [0.1, 0.2, 0.5, 0.25], "flags": ["group"]} | changes


def test_layouts_become_the_tokens_of_whole_images() -> None:
    condition = small(ObjectsCondition)
    written = [layout(one(), one(category=1, flags=[])), layout()]
    columns = condition.given(written)
    assert condition.images(columns) == 2
    placed = [(3, 1, (0.1, 0.2, 0.5, 0.25)), (1, 0, (0.1, 0.2, 0.5, 0.25))]
    assert condition.part(2, columns).tolist() == [
        slow(condition, placed, (0, 0, 1, 1, 0)),
        slow(condition, [], (0, 0, 1, 1, 0)),
    ]
    assert torch.equal(
        condition.part(1, condition.given(written[1])), condition.part(2, columns)[1:]
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], "a layout is .* or a list of such layouts"),
        ("cat", "a layout is"),
        ([{"object": []}], "layout 0 has no list 'objects'"),
        (layout(one(), 7), "layout 0, object 1: it is no object"),
        ([layout(), layout(one(category="cat"))], "layout 1, object 0: its category 'cat' is not"),
        (layout(one(category=5)), "the category 5, the transformer's are 0 to 4"),
        (layout(one(category=-1)), "its category -1 is not the number of one"),
        (layout(one(box=[0, 0, 1])), r"its box \[0, 0, 1\] is not left, top, width, height"),
        (layout(one(box=[0, 0, 1, "1"])), "is not left, top, width, height"),
        (layout(one(box=[0.6, 0, 0.5, 1])), r"its box \[0.6, 0, 0.5, 1\] reaches outside"),
        (layout(one(box=[-0.1, 0, 0.5, 1])), "reaches outside of the image"),
        (layout(one(box=[0, 0, 0, 1])), "has no area"),
        (layout(one(box=[0, 0, float("nan"), 1])), "has no area"),
        (layout(one(flags=["big"])), r"its flags \['big'\] are not a list of group"),
        (layout(*[one()] * 5), "layout 0 has 5 objects, more than the 4"),
    ],
)
def test_layouts_that_are_none_are_refused(written: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        small(ObjectsCondition).given(written)
    assert "\n" not in str(refusal.value)


def test_columns_that_do_not_fit_are_refused() -> None:
    condition = small(ObjectsCondition)
    columns = columns_of([([(7, 0, (0, 0, 1, 1))], (0, 0, 1, 1, 0))])
    with pytest.raises(UserError, match="category 7, the transformer's are 0 to 4"):
        condition.part(1, columns)
    with pytest.raises(UserError, match="2 images need 2 layouts, not 1"):
        condition.part(2, columns)
    with pytest.raises(UserError, match="give a layout"):
        condition.part(1, {})
