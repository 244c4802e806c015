"""Layouts that users write: the objects of an image, as `<key>.json` of image shards has them.

    {"objects": [{"category": 17, "box": [0.1, 0.2, 0.5, 0.25], "flags": ["group"]}, ...]}

Boxes are left, top, width, height as shares of the image. A file has one layout or a list of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from taming_dist.errors import UserError

# of the column box_flags; number k is the bit 2**k
STORED_FLAGS = ("group", "occluded", "truncated", "depiction", "inside")
TOLERANCE = 1e-6  # of a box's far sides: sums of decimal fractions


def layouts_of(value: Any) -> list[Mapping[str, Any]]:
    """Return the layouts in a value: itself, or those it lists.

    Raises:
        UserError: it is neither.
    """
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise UserError(f"{_WANTED}, or a list of such layouts")
    for number, layout in enumerate(found):
        if not isinstance(layout, Mapping) or not isinstance(layout.get("objects"), list):
            raise UserError(f"{_WANTED}; layout {number} has no list 'objects'")
    return list(found)


_WANTED = 'condition: a layout is {"objects": [{"category": 17, "box": [0.1, 0.2, 0.5, 0.25]}]}'


def layouts_as_columns(layouts: Sequence[Mapping[str, Any]], most: int) -> dict[str, Any]:
    """Return layouts as the columns of code shards of whole images, of at most `most` objects each.

    Raises:
        UserError: an object that is none, or outside of the image; it names layout and object.
    """
    for number, layout in enumerate(layouts):
        if len(layout["objects"]) > most:
            raise UserError(
                f"condition: layout {number} has {len(layout['objects'])} objects, more than the "
                f"{most} that the transformer has learned"
            )
        for index, entry in enumerate(layout["objects"]):
            fault = _fault(entry)
            if fault:
                raise UserError(f"condition: layout {number}, object {index}: {fault}")
    entries = [entry for layout in layouts for entry in layout["objects"]]
    counts = torch.tensor([len(layout["objects"]) for layout in layouts])
    flags = [sum(1 << STORED_FLAGS.index(flag) for flag in set(_flags(each))) for each in entries]
    return {
        "boxes": torch.tensor([entry["box"] for entry in entries]).view(-1, 4).float(),
        "box_class": torch.tensor([entry["category"] for entry in entries], dtype=torch.int64),
        "box_flags": torch.tensor(flags, dtype=torch.int64),
        "box_ends": counts.cumsum(0),
    }


def _flags(entry: Mapping[str, Any]) -> Any:
    return entry.get("flags", [])


def _fault(entry: Any) -> str:
    """What is wrong with an object; nothing if it can be used."""
    if not isinstance(entry, Mapping):
        return "it is no object with a category and a box"
    category, box, flags = entry.get("category"), entry.get("box"), _flags(entry)
    sides = box if isinstance(box, list) else []
    if type(category) is not int or category < 0:
        return f"its category {category!r} is not the number of one, from 0"
    if len(sides) != 4 or any(type(side) not in (int, float) for side in sides):
        return f"its box {box!r} is not left, top, width, height"
    if not isinstance(flags, list) or any(flag not in STORED_FLAGS for flag in flags):
        return f"its flags {flags!r} are not a list of {', '.join(STORED_FLAGS)}"
    left, top, width, height = sides
    if not (width > 0 and height > 0):
        return f"its box {box} has no area: give left, top, width, height"
    if not (0 <= left <= 1 + TOLERANCE - width and 0 <= top <= 1 + TOLERANCE - height):
        return f"its box {box} reaches outside of the image, whose sides are 1"
    return ""
