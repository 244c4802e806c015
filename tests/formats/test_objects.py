import json
from typing import Any

import numpy as np
import pytest

from taming_dist.formats.faults import BrokenData
from taming_dist.formats.objects import MAX_OBJECTS, Boxes, boxes_in_views, objects_of


def image(*boxes: list[float]) -> Boxes:
    """An image whose object k is of category k."""
    objects = [{"category": k, "box": box} for k, box in enumerate(boxes)]
    return objects_of({"objects": objects})


def view(left: float, top: float, width: float, height: float, mirrored: int = 0) -> np.ndarray:
    return np.array([left, top, width, height, mirrored], float)


def test_boxes_are_cut_off_at_the_view_and_what_is_outside_is_dropped() -> None:
    objects = image([0.25, 0, 0.5, 0.5], [0, 0, 0.5, 1], [0.5, 0, 0.25, 0.5], [0.6, 0.6, 0, 0])
    seen = boxes_in_views([objects], view(0.5, 0, 0.5, 1)[None, None])
    assert seen.places.tolist() == [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]
    assert seen.classes.tolist() == [0, 2]
    assert seen.ends.tolist() == [2]
    assert [a.dtype for a in (seen.places, seen.classes, seen.ends)] == ["f4", "i4", "i8"]


def test_flags_are_bits_and_stay_with_their_object() -> None:
    said: list[dict[str, Any]] = [
        {},
        {"flags": ["occluded"]},
        {"flags": ["inside", "group"], "unknown_flags": ["truncated"]},
        {"unknown_flags": ["group", "occluded"]},
    ]
    one = {"category": 0, "box": [0, 0, 0.5, 1]}
    objects = objects_of({"objects": [one | flags for flags in said]})
    assert objects.flags.dtype == np.uint8
    assert objects.flags.tolist() == [0, 2, 17, 0]
    away = objects_of({"objects": [{"category": 0, "box": [0.5, 0, 0.5, 1], "flags": ["group"]}]})
    seen = boxes_in_views([away, objects], view(0, 0, 0.5, 1)[None, None].repeat(2, axis=0))
    assert seen.ends.tolist() == [0, 4]
    assert seen.flags.tolist() == [0, 2, 17, 0]
    assert seen.take(np.array([1, 0])).flags.tolist() == [0, 2, 17, 0]
    assert Boxes.join([away, objects]).flags.tolist() == [1, 0, 2, 17, 0]


def test_in_a_mirrored_view_they_are_mirrored() -> None:
    seen = boxes_in_views([image([0.125, 0.25, 0.25, 0.5])], view(0, 0, 0.5, 1, 1)[None, None])
    assert seen.places.tolist() == [[0.25, 0.25, 0.5, 0.5]]


def test_every_view_of_every_image_has_its_own_rows() -> None:
    views = np.stack([view(0, 0, 0.5, 1), view(0.5, 0, 0.5, 1)])
    images = [image([0, 0, 0.1, 1], [0.9, 0, 0.1, 1]), image(), image([0, 0, 1, 1])]
    seen = boxes_in_views(images, np.stack([views] * 3))
    assert seen.ends.tolist() == [1, 2, 2, 2, 3, 4]
    assert seen.classes.tolist() == [0, 1, 0, 0]
    assert seen.fault() is None
    taken = seen.take(np.array([5, 2, 1]))
    assert (taken.classes.tolist(), taken.ends.tolist()) == ([0, 1], [1, 1, 2])
    whole = Boxes.join([seen.take(np.array([0, 1])), seen.take(np.array([2, 3, 4, 5]))])
    assert whole.ends.tolist() == seen.ends.tolist()
    assert np.array_equal(whole.places, seen.places)


@pytest.mark.parametrize(
    "objects",
    [
        None,
        [3],
        [{"box": [0, 0, 1, 1]}],
        [{"category": True, "box": [0, 0, 1, 1]}],
        [{"category": -1, "box": [0, 0, 1, 1]}],
        [{"category": 2**31, "box": [0, 0, 1, 1]}],
        [{"category": 1, "box": [0, 0, 1]}],
        [{"category": 1, "box": [0, 0, 1, "1"]}],
        [{"category": 1, "box": [0, 0, 1, float("nan")]}],
        [{"category": 1, "box": [0, 0, 1, 10**400]}],
        [{"category": 1, "box": [0, 0, 1, 1], "flags": "group"}],
        [{"category": 1, "box": [0, 0, 1, 1], "flags": ["crowd"]}],
        [{"category": 1, "box": [0, 0, 1, 1], "flags": [["group"]]}],
        [{"category": 1, "box": [0, 0, 1, 1]}] * (MAX_OBJECTS + 1),
    ],
)
def test_objects_of_another_form_make_a_broken_sample(objects: Any) -> None:
    facts = json.loads(json.dumps({"objects": objects}))
    with pytest.raises(BrokenData, match="its json|object 0"):
        objects_of(facts)


@pytest.mark.parametrize(
    ("places", "classes", "ends", "fault"),
    [
        ([[0, 0, 1, 1]], [0], [0, 2], "do not partition"),
        ([[0, 0, 1, 1]], [0], [2, 1], "do not partition"),
        ([[0, 0, 1, 1]], [0], [2**63 - 1, -(2**63), 1], "do not partition"),
        ([[0, 0, 1, 1]], [0], [], "do not partition"),
        ([[0, 0, 2, 1]], [0], [0, 1], "outside"),
        ([[0, 0, float("nan"), 1]], [0], [0, 1], "outside"),
        ([[0, 0, 1, 1]], [-1], [0, 1], "below 0"),
    ],
)
def test_damaged_numbers_are_found(places: Any, classes: Any, ends: Any, fault: str) -> None:
    boxes = Boxes(
        np.array(places, np.float32),
        np.array(classes, np.int32),
        np.zeros(len(classes), np.uint8),
        np.array(ends, np.int64),
    )
    assert fault in str(boxes.fault())
