"""Images with object boxes: COCO and Open Images.

A sample's JSON has `objects`, each with `category` (a number; the manifest's details have its
name), `box` [left, top, width, height] as fractions of the image and, if there are any, the `flags`
that are set and `unknown_flags`. Every object is kept; training decides which are used.
Categories are numbered as in the original: by their ids, sorted as text.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from taming_dist.errors import UserError
from taming_dist.prepare.collections.entry import Collection, Entry, LeftOut
from taming_dist.prepare.collections.folders import require_file, require_folder
from taming_dist.prepare.collections.splits import find, spellings

CATEGORIES = "categories"
# The original moves this one to the end; its published models use this numbering.
LAST_CATEGORY = "/m/01s55n"
HOLDS, HOLDS_NOT, UNKNOWN = 1, 0, -1  # as in Open Images
FLAG_FIELDS = {
    "IsGroupOf": "group",
    "IsOccluded": "occluded",
    "IsTruncated": "truncated",
    "IsDepiction": "depiction",
    "IsInside": "inside",
}


class Coco(Collection):
    """`root/<split>2017/` with `root/annotations/{instances,stuff,captions}_<split>2017.json`.

    The last two are read if they exist, and so are the label maps of things and stuff in
    `root/cocostuffthings/<split>2017` (or `stuffthingmaps`): 255 (unlabelled) becomes 0, and the
    182 classes become 1 to 182, as in the original.
    """

    def __init__(self, root: Path, split: str = "train") -> None:
        names = [*(f"{spelling}2017" for spelling in spellings(split)), split]
        name = next((name for name in names if (root / name).is_dir()), names[0])
        super().__init__(str(root / name))
        self._folder = require_folder(root / name)
        instances = _load(require_file(root / "annotations" / f"instances_{name}.json"))
        parts = [instances]
        stuff = root / "annotations" / f"stuff_{name}.json"
        if stuff.is_file():
            parts.append(_load(stuff))
        self._images = instances["images"]
        try:
            categories = _categories(parts)
            numbers = number_categories(categories)
            self._objects = _objects_by_image(parts, numbers)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{root / 'annotations'}: the file for {name} is not a COCO annotation file "
                f"({error!r} is missing)"
            ) from error
        self.details[CATEGORIES] = [categories[id] for id in numbers]
        self._captions = _read_captions(root / "annotations" / f"captions_{name}.json")
        self._maps = find([root / kind / name for kind in ("cocostuffthings", "stuffthingmaps")])
        self.label_shift = 0 if self._maps is None else 1

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        for image in self._images:
            try:
                entry = self._entry(image)
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise UserError(
                    f"{self.where}: its annotations are not in COCO's format ({error!r}): "
                    f"{str(image)[:200]}"
                ) from error
            yield entry

    def _entry(self, image: dict[str, Any]) -> Entry:
        name, width, height = image["file_name"], image["width"], image["height"]
        facts: dict[str, Any] = {"image_id": image["id"], "width": width, "height": height}
        if self._captions is not None:
            facts["captions"] = self._captions[image["id"]]
        facts["objects"] = [
            describe(category, _fractions(box, width, height), {"group": is_crowd})
            for category, box, is_crowd in self._objects[image["id"]]
        ]
        pairs = {}
        if self._maps is not None:
            pairs["seg"] = self._maps / Path(name).with_suffix(".png")
        return Entry(name, self._folder / name, pairs=pairs, facts=facts)


class OpenImages(Collection):
    """`root/<split>/` with `<split>-annotations-bbox.csv` and `class-descriptions-boxable.csv`.

    Holds the images that have boxes, in the order of that file, which is read line by line.
    """

    def __init__(self, root: Path, split: str = "train") -> None:
        name = next((s for s in spellings(split) if (root / s).is_dir()), split)
        super().__init__(str(root / name))
        self._folder = require_folder(root / name)
        boxes = f"{name}-annotations-bbox.csv"
        self._boxes = require_file(find([root / boxes, root / f"oidv6-{boxes}"]) or root / boxes)
        with open(require_file(root / "class-descriptions-boxable.csv"), newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 2 and row[0].startswith("/")]
        names = dict(rows)
        self._categories = number_categories(names)
        self.details[CATEGORIES] = [names[id] for id in self._categories]

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        with open(self._boxes, newline="") as file:
            rows = csv.DictReader(file)
            try:
                for id, own in groupby(rows, key=itemgetter("ImageID")):
                    objects = [
                        self._describe(row) for row in own if row["LabelName"] in self._categories
                    ]
                    facts = {"image_id": id, "objects": objects}
                    name = f"{id:0>16}.jpg"
                    yield Entry(name, self._folder / name, facts=facts)
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(
                    f"{self._boxes}, line {rows.line_num}: not an Open Images box ({error!r})"
                ) from error

    def _describe(self, row: dict[str, str]) -> dict[str, Any]:
        left, top = float(row["XMin"]), float(row["YMin"])
        box = [left, top, float(row["XMax"]) - left, float(row["YMax"]) - top]
        flags = {flag: int(row.get(field) or UNKNOWN) for field, flag in FLAG_FIELDS.items()}
        return describe(self._categories[row["LabelName"]], box, flags)


def describe(category: int, box: list[float], flags: Mapping[str, int]) -> dict[str, Any]:
    """An object's entry in a sample's JSON; a thousandth of a pixel is precise enough.

    `flags`: 1, 0 or -1 (unknown) by name.

    Raises:
        ValueError: other numbers, or a box with a side that is not finite.
    """
    if not set(flags.values()) <= {HOLDS, HOLDS_NOT, UNKNOWN}:
        raise ValueError(f"invalid flags {dict(flags)}")
    if not all(map(math.isfinite, box)):
        raise ValueError(f"invalid box {box}")
    found: dict[str, Any] = {"category": category, "box": [round(value, 6) for value in box]}
    for field, value in (("flags", HOLDS), ("unknown_flags", UNKNOWN)):
        names = [name for name, said in flags.items() if said == value]
        found |= {field: names} if names else {}
    return found


def number_categories(names: dict[str, str]) -> dict[str, int]:
    """The number of each category id."""
    ids = sorted(names, key=lambda id: (id == LAST_CATEGORY, id))
    return {id: number for number, id in enumerate(ids)}


def _load(path: Path) -> dict[str, Any]:
    def without_outlines(found: dict[str, Any]) -> dict[str, Any]:
        found.pop("segmentation", None)  # most of the file, and unused
        return found

    try:
        with open(path) as file:
            loaded = json.load(file, object_hook=without_outlines)
        if not isinstance(loaded, dict) or "images" not in loaded:
            raise ValueError("no list of images")
    except ValueError as error:
        raise UserError(f"{path} is not a COCO annotation file: {error}") from error
    return loaded


def _categories(parts: list[dict[str, Any]]) -> dict[str, str]:
    """Names by id, without "other", the stuff annotations' label for all things."""
    every = [category for part in parts for category in part["categories"]]
    return {str(one["id"]): one["name"] for one in every if one["name"] != "other"}


def _objects_by_image(
    parts: list[dict[str, Any]], categories: dict[str, int]
) -> dict[int, list[tuple[int, list[float], int]]]:
    found: dict[int, list[tuple[int, list[float], int]]] = defaultdict(list)
    for part in parts:
        for annotation in part["annotations"]:
            category = categories.get(str(annotation["category_id"]))
            if category is not None:
                is_crowd = int(bool(annotation["iscrowd"])) if "iscrowd" in annotation else UNKNOWN
                found[annotation["image_id"]].append((category, annotation["bbox"], is_crowd))
    return found


def _read_captions(path: Path) -> dict[int, list[str]] | None:
    if not path.is_file():
        return None
    found: dict[int, list[str]] = defaultdict(list)
    for annotation in _load(path)["annotations"]:
        found[annotation["image_id"]].append(annotation["caption"])
    return found


def _fractions(box: list[float], width: int, height: int) -> list[float]:
    left, top, box_width, box_height = box
    return [left / width, top / height, box_width / width, box_height / height]
