"""The objects of an image, as boxes or as centre points: scenes from layouts.

The tokens are those of the original's builders objects_bbox and objects_center_points, from the
columns of code shards. These differ from the original's annotations in two ways: of an object that
its view cuts they have the part that is seen, and images with more objects than fit are there,
which the original leaves out of the data set; the first ones are taken.

Legend: b images, k objects of all images, o of one, d tokens of an object, m of a prefix.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.crops import crops_of, window_crops
from taming_dist.models.prior.conditions.interface import Columns, Condition, Request
from taming_dist.models.prior.conditions.layouts import (
    STORED_FLAGS,
    layouts_as_columns,
    layouts_of,
)
from taming_dist.models.prior.window import Window
from taming_dist.ranges import check_ranges, ranged

ORDER = "object_order"  # the draws that objects are sorted by in training
TOKEN_FLAGS = ("group", "occluded", "depiction", "inside")  # number k is the bit 2**k
Box = tuple[float, float, float, float]


class Placed(NamedTuple):
    """An object of a layout: its category, its flags, and left, top, width, height as shares of the
    image; a centre point has neither width nor height."""

    category: int
    flags: tuple[str, ...]
    box: Box


class Layout(NamedTuple):
    """What a prefix says: the objects, and which part of the image is shown."""

    objects: tuple[Placed, ...]
    crop: Box


@dataclass
class ObjectsCondition(Condition):
    """The boxes of objects: category, upper left and lower right corner of each; then the crop's.

    The first token of an object is its category + `categories` * the bits of those of its `flags`
    that are used. Its places are cells of the largest square grid of at most `vocabulary` cells
    over the whole image, not the view. A prefix has room for `objects`; where there is none, it has
    the last token. Objects of at most `min_area`, as share of the image, are left out. In training
    they are shuffled, with other draws in each step.

    Source: the original's objects_bbox, with encode_crop; 30 objects make 92 tokens.
    """

    categories: int = ranged(0, at_least=0)
    vocabulary: int = ranged(8192, at_least=4)
    objects: int = ranged(30, at_least=1)
    flags: list[str] = dataclasses.field(default_factory=lambda: ["group"])
    min_area: float = ranged(0.0, at_least=0, below=1)
    name: str = "objects"
    columns: ClassVar[tuple[str, ...]] = ("boxes", "crop")
    tokens_each: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")
        for flag in self.flags:
            if flag not in TOKEN_FLAGS:
                raise UserError(f"model.condition.flags: {flag}: use {', '.join(TOKEN_FLAGS)}")

    @property
    def length(self) -> int:
        return self.objects * self.tokens_each + 2

    @property
    def nothing(self) -> int:
        """The token where there is no object."""
        return self.vocabulary - 1

    def part(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return the objects of each view, `nothing` up to their number, and the crop."""
        if "boxes" not in columns:
            raise UserError(
                "condition: this transformer is conditioned on objects, give a layout "
                "(condition=FILE.json), or code shards made with --boxes --coordinates"
            )
        classes, ends = columns["box_class"], columns["box_ends"]
        if len(ends) != count:
            raise UserError(f"condition: {count} images need {count} layouts, not {len(ends)}")
        self._check_categories(classes)
        crops = mirrored_crops(crops_of(count, columns))
        owners = owners_of(ends)
        boxes = boxes_in_images(columns["boxes"], crops[owners])
        kept = boxes[:, 2:].prod(1) > self.min_area
        what = classes + self.categories * self._modifiers(columns["box_flags"])
        tokens = torch.cat([what[:, None], self.places(boxes)], dim=1)[kept]
        found = table(tokens, owners[kept], count, self.objects, self.nothing)
        if ORDER in columns:
            found = shuffled(found, columns[ORDER], self.nothing)
        return torch.cat([found.flatten(1), self.corners(crops)], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Columns:
        return {ORDER: torch.rand(count, self.objects, generator=generator)}

    def window(self, count: int, columns: Columns, window: Window) -> Columns:
        """Return the objects that the window shows, each the part that is seen, and its crop."""
        left, top, width, height = window.crop
        start = torch.tensor([left, top], dtype=torch.float64)
        sides = torch.tensor([width, height], dtype=torch.float64)
        boxes, ends = columns["boxes"].double(), columns["box_ends"]
        near = ((boxes[:, :2] - start) / sides).clamp(0, 1)
        far = ((boxes[:, :2] + boxes[:, 2:] - start) / sides).clamp(0, 1)
        seen = (far > near).all(1)
        owners = owners_of(ends)[seen]
        return {
            **columns,
            "boxes": torch.cat([near, far - near], dim=1)[seen],
            "box_class": columns["box_class"][seen],
            "box_flags": columns["box_flags"][seen],
            "box_ends": torch.bincount(owners, minlength=len(ends)).cumsum(0),
            "crop": window_crops(count, columns, window),
        }

    def places(self, boxes: Float64[Tensor, "k 4"]) -> Int64[Tensor, "k p"]:
        """Return the tokens of an object that say where it is."""
        return self.corners(boxes)

    def corners(self, boxes: Float64[Tensor, "k 4"]) -> Int64[Tensor, "k 2"]:
        """Return the cells of the upper left and the lower right corners of boxes."""
        near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        return torch.stack([self.cells(near), self.cells(far)], dim=1)

    def cells(self, points: Float64[Tensor, "k 2"]) -> Int64[Tensor, "k"]:
        """Return the cells nearest to points (across, down), counted row by row."""
        last = math.isqrt(self.vocabulary) - 1
        across, down = (points.clamp(0, 1) * last).round().long().unbind(1)
        return down * (last + 1) + across

    def layout(self, tokens: Int64[Tensor, "m"]) -> Layout:
        """Return what a prefix says, for display: places are those of their cells."""
        *objects, crop = *tokens[:-2].view(self.objects, -1).tolist(), tokens[-2:].tolist()
        return Layout(
            tuple(self._placed(*each) for each in objects if each[0] != self.nothing),
            self.box(*crop),
        )

    def box(self, near: int, far: int) -> Box:
        """Return the box between two cells."""
        (left, top), (right, bottom) = self.point(near), self.point(far)
        return left, top, right - left, bottom - top

    def point(self, cell: int) -> tuple[float, float]:
        """Return the place (across, down) of a cell."""
        sections = math.isqrt(self.vocabulary)
        return cell % sections / (sections - 1), cell // sections / (sections - 1)

    def check(self) -> None:
        if self.categories < 1:
            raise UserError(
                f"model.condition.categories: {self.categories} is too few for model/condition="
                f"{self.name}, give how many the data set has"
            )
        bits = sum(1 << TOKEN_FLAGS.index(flag) for flag in set(self.flags))
        needed = self.categories * (bits + 1) + 1
        if self.vocabulary < needed:
            raise UserError(
                f"model.condition.vocabulary: {self.vocabulary} tokens are too few for "
                f"{self.categories} categories with flags={self.flags}, give at least {needed}"
            )

    def given(self, value: Any) -> Columns:
        """Columns by name, or layouts as a JSON file has them (see `layouts`)."""
        if isinstance(value, Mapping) and "boxes" in value:
            return super().given(value)
        found = layouts_as_columns(layouts_of(value), self.objects)
        self._check_categories(found["box_class"])
        return found

    def images(self, columns: Columns) -> int:
        return len(columns["box_ends"])

    def requested(self, request: Request) -> Columns:
        """The layouts of a JSON file in turn, or else the samples of code shards."""
        if not request.is_file or request.class_id is not None:
            return super().requested(request)
        layouts = layouts_of(request.read_json(request.condition))
        return self.given([layouts[image % len(layouts)] for image in request.images])

    def period(self, request: Request) -> int:
        return len(layouts_of(request.read_json(request.condition))) if request.is_file else 1

    def _placed(self, what: int, *places: int) -> Placed:
        modifier, category = divmod(what, self.categories)
        flags = (flag for bit, flag in enumerate(TOKEN_FLAGS) if modifier >> bit & 1)
        return Placed(category, tuple(flags), self.box(places[0], places[-1]))

    def _modifiers(self, stored: Int64[Tensor, "k"]) -> Int64[Tensor, "k"]:
        """The bits of the tokens' flags from those of the column."""
        bits = torch.zeros_like(stored)
        for flag in set(self.flags):
            holds = stored >> STORED_FLAGS.index(flag) & 1
            bits |= holds << TOKEN_FLAGS.index(flag)
        return bits

    def _check_categories(self, classes: Int64[Tensor, "k"]) -> None:
        outside = classes[(classes < 0) | (classes >= self.categories)]
        if outside.numel():
            raise UserError(
                f"condition: an object has the category {int(outside[0])}, the transformer's are 0 "
                f"to {self.categories - 1} (model.condition.categories={self.categories})"
            )


@dataclass
class ObjectCentersCondition(ObjectsCondition):
    """The centres of objects: category and centre of each; then the crop's corners.

    Source: the original's objects_center_points, with encode_crop; 30 objects make 62 tokens.
    """

    name: str = "object_centers"
    tokens_each: ClassVar[int] = 2

    def places(self, boxes: Float64[Tensor, "k 4"]) -> Int64[Tensor, "k p"]:
        return self.cells(boxes[:, :2] + boxes[:, 2:] / 2)[:, None]


def owners_of(ends: Int64[Tensor, "b"]) -> Int64[Tensor, "k"]:
    """Return the image of each object, from where those of each image end."""
    return torch.arange(len(ends)).repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))


def mirrored_crops(crops: Float64[Tensor, "b 5"]) -> Float64[Tensor, "b 4"]:
    """Return left, top, width, height of crops [b, 5] in their images, mirrored where they are."""
    left, top, width, height, mirrored = crops.unbind(1)
    return torch.stack([torch.where(mirrored > 0, 1 - left - width, left), top, width, height], 1)


def boxes_in_images(
    boxes: Float[Tensor, "k 4"], crops: Float64[Tensor, "k 4"]
) -> Float64[Tensor, "k 4"]:
    """Return boxes, shares of views, as shares of the images that the views are the crops of."""
    starts, sides = crops[:, :2], crops[:, 2:]
    return torch.cat([starts + boxes[:, :2] * sides, boxes[:, 2:] * sides], dim=1)


def table(
    rows: Int64[Tensor, "k d"], owners: Int64[Tensor, "k"], count: int, most: int, nothing: int
) -> Int64[Tensor, "b o d"]:
    """Return the first `most` rows of each of `count` owners, which ascend; `nothing` elsewhere."""
    counts = torch.bincount(owners, minlength=count)
    ranks = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    fits = ranks < most
    found = torch.full((count, most, rows.shape[1]), nothing)
    found[owners[fits], ranks[fits]] = rows[fits]
    return found


def shuffled(
    found: Int64[Tensor, "b o d"], draws: Float[Tensor, "b o"], nothing: int
) -> Int64[Tensor, "b o d"]:
    """Return each image's objects in the order of its draws, those that are not there last."""
    places = draws.masked_fill(found[:, :, 0] == nothing, math.inf).argsort(dim=1, stable=True)
    return found.gather(1, places[:, :, None].expand_as(found))
