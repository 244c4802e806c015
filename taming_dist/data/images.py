"""Images: from the pixels of files to the crops that networks read.

Pixel maps of an image, such as label maps or depth, are cropped and flipped exactly as the image.
Random numbers depend on seed, epoch and sample only. Does not import torch: the decoding process
has to start quickly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from taming_dist.data.order import PIXELS, random_words
from taming_dist.errors import UserError
from taming_dist.formats.encoded import Encoded, open_depth, open_edges, open_image, open_labels
from taming_dist.formats.shards import IMAGE_EXTENSIONS
from taming_dist.formats.storage import Bytes

Shape = tuple[int, int]  # height and width in pixels


def in_proportion(size: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether two sizes have the same proportions, up to one pixel."""
    (height, width), (whole_height, whole_width) = size, whole
    return abs(height * whole_width - width * whole_height) <= max(whole)


def resize_short_side(
    pixels: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Resize uint8 [h, w(, 3)] to a shorter side of `size` pixels; unchanged if it has that."""
    height, width = pixels.shape[:2]
    if min(height, width) == size:
        return pixels
    resized_height, resized_width = _resized(height, width, (size, size))
    return np.array(Image.fromarray(pixels).resize((resized_width, resized_height), method))


def _resized(height: int, width: int, shape: Shape) -> Shape:
    """The smallest height and width in these proportions that cover a shape; of a square they have
    its side as the shorter one."""
    rows, columns = shape
    if height * columns >= width * rows:
        return max(rows, round(height * columns / width)), columns
    return rows, max(columns, round(width * rows / height))


class View(NamedTuple):
    """The rectangle of an image that becomes one of `shape` (height, width), perhaps flipped.

    `left`, `top`, `width`, `height` are in pixels of the image, not necessarily whole.
    """

    left: float
    top: float
    width: float
    height: float
    shape: Shape
    flipped: bool = False

    def crop(self, height: int, width: int) -> tuple[float, float, float, float, float]:
        """Left, top, width, height as fractions of an image of this size, and 1 if flipped."""
        across, down = self.width / width, self.height / height
        return self.left / width, self.top / height, across, down, float(self.flipped)

    def on(self, down: float, across: float) -> View:
        """The same view of the image in another size, `down` times as high, `across` as wide."""
        if down == across == 1:
            return self
        left, width = self.left * across, self.width * across
        return View(left, self.top * down, width, self.height * down, self.shape, self.flipped)

    def cut(
        self,
        pixels: np.ndarray,
        out: np.ndarray,
        method: Image.Resampling = Image.Resampling.LANCZOS,
    ) -> None:
        """Write this view of `pixels` [h, w(, c)] to `out` [*shape(, c)].

        A flipped view is read backwards, channels included: give BGR to get RGB. Resizing the whole
        image and cropping it gives the same up to rounding.
        """
        left, top, (rows, columns) = round(self.left), round(self.top), self.shape
        if (left, top, columns, rows) == (self.left, self.top, self.width, self.height):
            found = pixels[top : top + rows, left : left + columns]
        else:
            right, bottom = self.left + self.width, self.top + self.height
            # Rounding must not push the box over the edge, which Pillow refuses.
            box = (self.left, self.top, min(right, pixels.shape[1]), min(bottom, pixels.shape[0]))
            found = np.asarray(Image.fromarray(pixels).resize((columns, rows), method, box))
        if self.flipped:
            copy_backwards(found, out)
        else:
            out[...] = found


def copy_backwards(pixels: np.ndarray, out: np.ndarray) -> None:
    """Copy [h, w(, c)] with the elements of each row in reverse order."""
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1)  # so that words are aligned
    target = out.reshape(len(out), -1)
    if rows.itemsize == 1 and rows.shape[1] % 8 == 0:
        # Eight bytes at a time, byte-swapped: 2.5 times as fast as one by one.
        rows, target = rows.view("<u8"), target.view(">u8")
    target[...] = rows[:, ::-1]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of pixels of a sample.

    `files`: the possible extensions of its file, which `open` reads; `dtype` and `depth`, () or
    (3,), of the pixels [h, w, *depth]; `method` resizes them; `may_be_smaller` than the other
    columns of the sample.
    """

    files: tuple[str, ...]
    open: Callable[[Bytes], Encoded]
    method: Image.Resampling
    dtype: type[np.generic] = np.uint8
    depth: tuple[int, ...] = ()
    may_be_smaller: bool = False


# In the order in which they are read: the first of a batch decides where the others are cropped.
# Class ids cannot be blended, so label maps are resized by nearest neighbour.
COLUMNS: dict[str, Column] = {
    "image": Column(
        files=IMAGE_EXTENSIONS, open=open_image, method=Image.Resampling.LANCZOS, depth=(3,)
    ),
    "seg.png": Column(files=("seg.png",), open=open_labels, method=Image.Resampling.NEAREST),
    "depth.png": Column(
        files=("depth.png",),
        open=open_depth,
        method=Image.Resampling.BILINEAR,
        dtype=np.float32,
    ),
    "edges.png": Column(files=("edges.png",), open=open_edges, method=Image.Resampling.LANCZOS),
    "lr": Column(
        files=tuple(f"lr.{extension}" for extension in IMAGE_EXTENSIONS),
        open=open_image,
        method=Image.Resampling.BICUBIC,
        depth=(3,),
        may_be_smaller=True,
    ),
}


class Crop(Protocol):
    """Which part of an image is used: left, top, width, height in pixels of the image."""

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        """`words` [23] are random in [0, 2^64); the same words give the same box."""
        ...


@dataclass(frozen=True)
class CenterCrop:
    """The largest square in the centre."""

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        return _centre(height, width, (size, size))


@dataclass(frozen=True)
class RandomCrop:
    """The largest square, at a random place."""

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        shape = size, size
        return _largest(height, width, shape, lambda spare, word: _below(spare + 1, word), words)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A rectangle of random area, aspect ratio and place (Szegedy et al. 2015).

    `scale`: fraction of the area, uniform; `ratio`: width by height, log-uniform. After ten draws
    that do not fit, the centre.
    """

    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(
                f"data.crop_scale is {list(self.scale)} but must be two fractions of the area, the "
                f"smaller first, above 0 and up to 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(
                f"data.crop_ratio is {list(self.ratio)} but must be two positive ratios of width "
                f"to height, the smaller first"
            )

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        low, high = (math.log(ratio) for ratio in self.ratio)
        for first, second in zip(words[3::2], words[4::2], strict=True):
            share = self.scale[0] + (self.scale[1] - self.scale[0]) * first / 2**64
            ratio = math.exp(low + (high - low) * second / 2**64)
            area = height * width * share
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                left = _below(width - wide + 1, words[1])
                return left, _below(height - tall + 1, words[0]), wide, tall
        return CenterCrop().box(height, width, size, words)


def centre_view(height: int, width: int, shape: Shape) -> View:
    """The view of the largest part in the centre of an image that has the proportions of `shape`;
    of a square that is `CenterCrop`."""
    return View(*_centre(height, width, shape), shape)


def _centre(height: int, width: int, shape: Shape) -> tuple[float, float, float, float]:
    return _largest(height, width, shape, lambda spare, _: spare // 2, (0, 0))


def _largest(
    height: int,
    width: int,
    shape: Shape,
    place: Callable[[int, int], int],
    words: Sequence[int],
) -> tuple[float, float, float, float]:
    """The box, at `place`, that gives the pixels of `shape` of an image resized to cover it."""
    resized_height, resized_width = _resized(height, width, shape)
    across, down = width / resized_width, height / resized_height
    rows, columns = shape
    left, top = place(resized_width - columns, words[1]), place(resized_height - rows, words[0])
    return left * across, top * down, columns * across, rows * down


def _below(limit: int, word: int) -> int:
    """A number in [0, limit): the high bits of a word scaled to the range; no measurable bias."""
    return word * limit >> 64


NUM_WORDS = 3 + 2 * 10  # top, left, flip, then ten draws of area and ratio
MANY = 64  # neighbours, which the order of samples keeps together, draw their words together


@lru_cache(maxsize=1024)
def _words_of_many(seed: int, epoch: int, many: int) -> np.ndarray:
    """The words [MANY, NUM_WORDS] of the samples from `many * MANY` on."""
    words = random_words(seed, PIXELS, epoch, many, count=MANY * NUM_WORDS)
    return words.reshape(MANY, NUM_WORDS)


@dataclass(frozen=True)
class Preprocess:
    """The view of each image that is read: a crop, resized to `size` pixels, perhaps flipped."""

    size: int
    crop: Crop = CenterCrop()
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"data.size is {self.size} but must be at least 1")

    def words(self, seed: int, epoch: int, sample: int) -> list[int]:
        """The random words of a sample; a function of the arguments, nothing else."""
        row: list[int] = _words_of_many(seed, epoch, sample // MANY)[sample % MANY].tolist()
        return row

    def view(self, height: int, width: int, words: Sequence[int]) -> View:
        """The view of an image of this size that is determined by these words."""
        box = self.crop.box(height, width, self.size, words)
        return View(*box, (self.size, self.size), self.flip and bool(words[2] >> 63))
