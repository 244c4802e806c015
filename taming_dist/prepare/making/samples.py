"""Making one sample of a shard: the files stored for an image and its maps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from taming_dist.data.images import in_proportion
from taming_dist.data.texts import CAPTION, text_of
from taming_dist.formats.faults import BrokenData
from taming_dist.prepare.making.catalogue import Catalogue, Record
from taming_dist.prepare.making.derived import canny_edges, low_resolution
from taming_dist.prepare.making.layers import (
    Layer,
    Picture,
    Turn,
    Unfit,
    open_depth,
    open_edges,
    open_labels,
    open_picture,
)

LOW_RESOLUTION = "lr"


@dataclass(frozen=True)
class Recipe:
    """What to do with every image.

    `short_side`: scale larger images down to it. `quality`: of new JPEGs. `min_side`: leave out
    smaller images. `canny`: compute edges. `low_resolution`: compute an image smaller by this
    factor. `label_shift`: added to label maps, modulo 256. `use_damaged`: store what is left of a
    damaged JPEG rather than leave it out.
    """

    short_side: int | None = None
    quality: int = 95
    min_side: int = 8
    canny: bool = False
    low_resolution: int | None = None
    label_shift: int = 0
    use_damaged: bool = False


@dataclass(frozen=True)
class Sample:
    """The files of a sample by extension, and notes on its image."""

    files: dict[str, bytes]
    notes: tuple[str, ...]


def make_sample(catalogue: Catalogue, record: Record, recipe: Recipe) -> Sample:
    """Make the files of a sample; raises `Unfit` if the image or a pair cannot be used."""
    picture = open_picture(catalogue.read_image(record), recipe.use_damaged)
    if min(picture.layer.shape) < recipe.min_side:
        height, width = picture.layer.shape
        raise Unfit("tiny", f"{width} x {height} pixels: a side below {recipe.min_side}")
    columns = [column for column in record.pairs if column != CAPTION]
    maps = [open_map(column, catalogue.read_pair(record, column), recipe) for column in columns]
    turn = choose_turn(picture, record.facts)
    image, maps = turn_upright(picture.layer, maps, turn)
    size = recipe.short_side
    is_scaled = size is not None and min(image.shape) > size
    if size is not None and is_scaled:
        image, maps = scale(image, maps, size)
    layers = [image, *maps, *computed(image.pixels, recipe)]
    files = {layer.extension: layer.encode(recipe.quality) for layer in layers}
    if CAPTION in record.pairs:
        files[CAPTION] = checked_caption(catalogue.read_pair(record, CAPTION))
    if record.facts:
        files["json"] = json.dumps(record.facts, separators=(",", ":"), allow_nan=False).encode()
    if record.cls is not None:
        files["cls"] = str(record.cls).encode()
    changes = (("turned upright", turn is not None), ("scaled", is_scaled))
    return Sample(files, (*picture.notes, *(name for name, happened in changes if happened)))


def checked_caption(data: bytes) -> bytes:
    """A caption as it is stored; raises `Unfit` if no reader could use it."""
    try:
        text_of({CAPTION: memoryview(data)}, CAPTION)
    except BrokenData as error:
        raise Unfit("pair", str(error)) from error
    return data


def open_map(column: str, data: bytes, recipe: Recipe) -> Layer:
    """Decode a map that belongs to an image; raises `Unfit` naming the column."""
    try:
        if column == "seg":
            return open_labels(data, recipe.label_shift)
        if column == "depth":
            return open_depth(data)
        if column == "edges":
            return open_edges(data)
        assert column == LOW_RESOLUTION
        small = open_picture(data).layer
        return Layer(f"{LOW_RESOLUTION}.{small.extension}", small.pixels, small.data)
    except Unfit as error:
        raise Unfit("pair", f"its {column} file: {error.reason}") from error


def choose_turn(picture: Picture, facts: Mapping[str, Any]) -> Turn | None:
    """The turn that makes an image upright; None if it is, or if its boxes fit the file as is."""
    if picture.turn is None or "objects" not in facts:
        return picture.turn
    upright = picture.turn(picture.layer.pixels).shape[:2]
    boxes_are_upright = (facts.get("height"), facts.get("width")) == upright
    return picture.turn if boxes_are_upright and upright != picture.layer.shape else None


def turn_upright(image: Layer, maps: list[Layer], turn: Turn | None) -> tuple[Layer, list[Layer]]:
    """Turn an image and the maps that match its file; maps that match the result are upright.

    Raises:
        Unfit: a map matches neither.
    """
    upright = image if turn is None else image.turned(turn)
    aligned = []
    for layer in maps:
        if turn is not None and fits(layer, image):
            aligned.append(layer.turned(turn))
        elif fits(layer, upright):
            aligned.append(layer)
        else:
            column = layer.extension.partition(".")[0]
            raise Unfit("pair", f"its {column} file has a different size, {layer.shape}")
    return upright, aligned


def fits(layer: Layer, image: Layer) -> bool:
    """Whether a map has the size of its image, or a low-resolution image its proportions."""
    if not is_low_resolution(layer):
        return layer.shape == image.shape
    return in_proportion(layer.shape, image.shape)


def is_low_resolution(layer: Layer) -> bool:
    return layer.extension.startswith(LOW_RESOLUTION)


def scale(image: Layer, maps: list[Layer], short_side: int) -> tuple[Layer, list[Layer]]:
    """Scale an image, which becomes a JPEG, and its maps except a low-resolution image."""
    scaled = Layer("jpg", image.scaled(short_side).pixels, None)
    return scaled, [m if is_low_resolution(m) else m.scaled(short_side) for m in maps]


def computed(pixels: np.ndarray, recipe: Recipe) -> list[Layer]:
    """The conditions that are computed from the stored image."""
    layers = []
    if recipe.canny:
        layers.append(Layer("edges.png", canny_edges(pixels), None))
    if recipe.low_resolution is not None:
        small = low_resolution(pixels, recipe.low_resolution)
        layers.append(Layer(f"{LOW_RESOLUTION}.png", small, None))
    return layers
