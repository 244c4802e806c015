"""Objects with boxes: from an image's JSON to the boxes in each of its views.

Boxes are left, top, width, height as fractions: of the image in `<key>.json` (described in
docs/making-shards.md), of the view in code shards. Does not import torch: the decoding process
reads them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taming_dist.formats.faults import BrokenData

MAX_OBJECTS = 4096  # per image; Open Images has fewer than a thousand
MAX_CATEGORY = 2**31
FLAGS = ("group", "occluded", "truncated", "depiction", "inside")  # number k is the bit 2**k


@dataclass(frozen=True)
class Boxes:
    """The objects of n images or views: those of the k-th are the rows ends[k - 1] to ends[k].

    `places` [m, 4]: left, top, width, height; `classes` int32 [m], their categories; `flags` uint8
    [m], the bits of `FLAGS` that are set (unknown ones are not); `ends` int64 [n], cumulative.
    """

    places: np.ndarray
    classes: np.ndarray
    flags: np.ndarray
    ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """The number of objects of each image or view, int64 [n]."""
        return np.diff(self.ends, prepend=0)

    def take(self, numbers: np.ndarray) -> "Boxes":
        """The objects of some of the images or views, in the order of `numbers`."""
        starts = np.where(numbers > 0, self.ends[numbers - 1], 0)
        counts = self.ends[numbers] - starts
        rows = spans(starts, counts)
        ends = np.cumsum(counts)
        return Boxes(self.places[rows], self.classes[rows], self.flags[rows], ends)

    @classmethod
    def join(cls, parts: Iterable["Boxes"]) -> "Boxes":
        """The objects of all parts, one after the other; none if there are no parts."""
        known = [NO_BOXES, *parts]
        return cls(
            np.concatenate([part.places for part in known]),
            np.concatenate([part.classes for part in known]),
            np.concatenate([part.flags for part in known]),
            np.cumsum(np.concatenate([part.counts for part in known])),
        )

    def fault(self) -> str | None:
        """What is wrong with the numbers, or None."""
        # Comparing rather than subtracting: differences of damaged numbers may overflow.
        bounds = np.concatenate([[0], self.ends])
        if (bounds[:-1] > bounds[1:]).any() or bounds[-1] != len(self.places):
            return f"box_ends that do not partition {len(self.places)} boxes"
        if not ((self.places >= 0) & (self.places <= 1)).all():
            return "boxes outside the range 0 to 1"
        if (self.flags >= 2 ** len(FLAGS)).any():
            return f"box_flags with more than {len(FLAGS)} bits"
        return "box_class below 0" if (self.classes < 0).any() else None


NO_BOXES = Boxes(
    np.empty((0, 4), np.float32),
    np.empty(0, np.int32),
    np.empty(0, np.uint8),
    np.empty(0, np.int64),
)


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers starts[k] to starts[k] + counts[k] - 1 for each k, in one array."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def objects_of(facts: dict[str, Any]) -> Boxes:
    """The objects listed in one image's JSON, fp64.

    Boxes may extend beyond the image, as some in Open Images do.

    Raises:
        BrokenData: they are malformed.
    """
    objects = facts.get("objects")
    if not isinstance(objects, list):
        raise BrokenData("its json has no list 'objects'")
    if len(objects) > MAX_OBJECTS:
        raise BrokenData(f"its json has {len(objects)} objects, more than {MAX_OBJECTS}")
    for number, entry in enumerate(objects):
        if not _is_object(entry):
            raise BrokenData(
                f"object {number} of its json has no category, no box of 4 numbers, or flags that "
                f"are not among {', '.join(FLAGS)}"
            )
    return Boxes(
        np.array([entry["box"] for entry in objects], np.float64).reshape(-1, 4),
        np.array([entry["category"] for entry in objects], np.int32),
        np.array([_bits(entry.get("flags", [])) for entry in objects], np.uint8),
        np.array([len(objects)]),
    )


def _is_object(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    category, box, flags = entry.get("category"), entry.get("box"), entry.get("flags", [])
    return (
        type(category) is int
        and 0 <= category < MAX_CATEGORY
        and isinstance(box, list)
        and len(box) == 4
        # Also false for NaN, which Python accepts in JSON.
        and all(type(side) in (int, float) and abs(side) <= MAX_CATEGORY for side in box)
        and isinstance(flags, list)
        and all(flag in FLAGS for flag in flags)
    )


def _bits(flags: list[str]) -> int:
    return sum(1 << FLAGS.index(flag) for flag in set(flags))


def boxes_in_views(objects: Sequence[Boxes], crops: np.ndarray) -> Boxes:
    """The objects of b images as each view shows them: clipped to the view, mirrored with it.

    `objects`: those of each image, as fractions of it. `crops` [b, views, 5]: left, top, width,
    height of the views as fractions of the image, 1 if mirrored.

    Returns:
        The objects of b x views, all views of an image in a row, without those that do not overlap
        their view.
    """
    images, views = crops.shape[:2]
    known = Boxes.join(objects).take(np.repeat(np.arange(images), views))
    owners = np.repeat(np.arange(images * views), known.counts)
    left, top, width, height, mirrored = crops.reshape(-1, 5)[owners].T
    near_x, far_x = _inside(known.places[:, 0], known.places[:, 2], left, width)
    near_y, far_y = _inside(known.places[:, 1], known.places[:, 3], top, height)
    start = np.where(mirrored > 0, 1 - far_x, near_x)
    places = np.stack([start, near_y, far_x - near_x, far_y - near_y], 1).astype(np.float32)
    seen = (places[:, 2] > 0) & (places[:, 3] > 0)
    counts = np.bincount(owners[seen], minlength=images * views)
    return Boxes(places[seen], known.classes[seen], known.flags[seen], np.cumsum(counts))


def _inside(
    start: np.ndarray, length: np.ndarray, view_start: np.ndarray, view_length: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of intervals as fractions of their views, clipped to [0, 1]."""
    near = (start - view_start) / view_length
    far = (start + length - view_start) / view_length
    return np.clip(near, 0, 1), np.clip(far, 0, 1)
