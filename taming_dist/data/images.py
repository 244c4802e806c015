"""Images: from encoded bytes to the uint8 crops that networks are fed with.

simplejpeg decodes what it can (bit-identical to Pillow, 1.5 times as fast), Pillow the rest. What
belongs to an image pixel by pixel, a label map or depth, is cut and flipped exactly as the image.
EXIF rotation is not applied, as in the original. Random numbers depend on seed, epoch and sample
only. Imports no torch: the process that decodes has to start quickly.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from taming_dist.data.faults import BrokenData
from taming_dist.data.order import PIXELS, random_words
from taming_dist.data.shards import IMAGE_EXTENSIONS
from taming_dist.data.storage import Bytes
from taming_dist.errors import UserError

Decoding = TypeVar("Decoding", bound=Callable[..., np.ndarray])
MAX_PIXELS = 2**26  # 8192 x 8192: larger images are taken for decompression bombs
JPEG_MAGIC = b"\xff\xd8"
FORMATS = ("JPEG", "PNG", "WEBP")  # the few of Pillow's decoders that data may reach


def as_broken_data(what: str) -> Callable[[Decoding], Decoding]:
    """Have a decoder raise `BrokenData` whatever is wrong: damaged files give a dozen types."""

    def wrap(function: Decoding) -> Decoding:
        @wraps(function)
        def decoding(*args: Any, **kwargs: Any) -> np.ndarray:
            try:
                return function(*args, **kwargs)
            except (BrokenData, MemoryError):
                raise
            except UnidentifiedImageError as error:
                raise BrokenData(f"the {what} is no JPEG, PNG or WebP file") from error
            except Exception as error:
                raise BrokenData(f"the {what} cannot be decoded ({error})") from error

        return cast("Decoding", decoding)

    return wrap


Channels = Literal["RGB", "BGR"]


class Scratch(threading.local):
    """Memory of each thread for the pixels of one image: used again, it stays in the cache."""

    def __init__(self) -> None:
        self.pixels = np.empty(2**22, dtype=np.uint8)  # larger images would not stay there


@as_broken_data("image")
def decode(
    data: Bytes,
    max_pixels: int = MAX_PIXELS,
    channels: Channels = "RGB",
    scratch: Scratch | None = None,
) -> np.ndarray:
    """Decode a JPEG, PNG or WebP to uint8 [h, w, 3], in `scratch` if that is given and fits.

    Raises `BrokenData` if the bytes are no such image, are cut, have more than `max_pixels`
    pixels, or more than 8 bits per channel (which a conversion would clip).
    """
    pixels = _decode_jpeg(data, max_pixels, channels, scratch) if data[:2] == JPEG_MAGIC else None
    if pixels is not None:
        return pixels
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.width, image.height, max_pixels)
        if image.mode[0] in "IF":
            raise BrokenData(f"pixels of mode {image.mode}: only 8 bits are read")
        pixels = np.array(image.convert("RGB"))
        return pixels if channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


@as_broken_data("label map")
def decode_labels(data: Bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a label map, a PNG of one channel or with a palette, to class ids, uint8 [h, w]."""
    return _decode_map(data, ("L", "P"), "one 8-bit channel", max_pixels)


@as_broken_data("edge map")
def decode_edges(data: Bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode edges, a PNG of one channel of 8 bits, to uint8 [h, w]; 255 is an edge."""
    return _decode_map(data, ("L",), "one 8-bit channel", max_pixels)


@as_broken_data("depth map")
def decode_depth(data: Bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a depth map, a PNG of one channel of 8 or 16 bits, to fp32 [h, w] in [0, 1].

    1 is the largest number that the file's bits can hold; nothing is rescaled per image.
    """
    modes = ("L", "I", "I;16", "I;16B")
    depth = _decode_map(data, modes, "one channel of 8 or 16 bits", max_pixels)
    return depth.astype(np.float32) / np.float32(255 if depth.dtype == np.uint8 else 65535)


def _decode_map(data: Bytes, modes: Sequence[str], needed: str, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.width, image.height, max_pixels)
        if image.mode not in modes:
            raise BrokenData(f"a map of mode {image.mode}, but {needed} is needed")
        return np.array(image)


def _decode_jpeg(
    data: Bytes, max_pixels: int, channels: Channels, scratch: Scratch | None
) -> np.ndarray | None:
    """None where Pillow has to try: CMYK, and files that are only nearly JPEG."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        fits = scratch is not None and 3 * height * width <= len(scratch.pixels)
        buffer = scratch.pixels if scratch is not None and fits else None
        return simplejpeg.decode_jpeg(data, colorspace=channels, buffer=buffer)
    except ValueError:
        return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BrokenData(f"{width} x {height} pixels, more than {max_pixels}: refused as a bomb")


def in_proportion(size: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether heights and widths are those of one picture in two sizes, but for a pixel."""
    (height, width), (whole_height, whole_width) = size, whole
    return abs(height * whole_width - width * whole_height) <= max(whole)


def resize_short_side(
    pixels: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Resize uint8 [h, w(, 3)] so that the shorter side has `size` pixels; the same, if it has."""
    height, width = pixels.shape[:2]
    if min(height, width) == size:
        return pixels
    resized_height, resized_width = _resized(height, width, size)
    return np.array(Image.fromarray(pixels).resize((resized_width, resized_height), method))


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side has `size` pixels."""
    short = min(height, width)
    return max(size, round(height * size / short)), max(size, round(width * size / short))


@dataclass(frozen=True)
class View:
    """The rectangle of an image that becomes a square of `size` pixels, perhaps flipped.

    `left`, `top`, `width`, `height` are in pixels of the image, and need not be whole.
    """

    left: float
    top: float
    width: float
    height: float
    size: int
    flipped: bool = False

    def crop(self, height: int, width: int) -> tuple[float, float, float, float, float]:
        """Left, top, width, height as shares of an image of this size, and 1 if flipped."""
        across, down = self.width / width, self.height / height
        return self.left / width, self.top / height, across, down, float(self.flipped)

    def on(self, down: float, across: float) -> View:
        """The same view of the image in another size: `down` times as high, `across` as wide."""
        if down == across == 1:
            return self
        left, width = self.left * across, self.width * across
        return View(left, self.top * down, width, self.height * down, self.size, self.flipped)

    def cut(
        self,
        pixels: np.ndarray,
        out: np.ndarray,
        method: Image.Resampling = Image.Resampling.LANCZOS,
    ) -> None:
        """Write this view of `pixels` [h, w(, c)] to `out` [size, size(, c)].

        A flipped view is read backwards, channels too: give them as BGR to get RGB. Resizing all of
        the image and cutting from it gives the same, but for rounding.
        """
        left, top, size = round(self.left), round(self.top), self.size
        if (left, top, size, size) == (self.left, self.top, self.width, self.height):
            square = pixels[top : top + size, left : left + size]
        else:
            right, bottom = self.left + self.width, self.top + self.height
            # Rounding may not carry the box over the edge, which Pillow refuses.
            box = (self.left, self.top, min(right, pixels.shape[1]), min(bottom, pixels.shape[0]))
            square = np.asarray(Image.fromarray(pixels).resize((size, size), method, box))
        if self.flipped:
            copy_backwards(square, out)
        else:
            out[...] = square


def copy_backwards(pixels: np.ndarray, out: np.ndarray) -> None:
    """Copy [h, w(, c)] so that what follows the first axis stands in reverse order."""
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1)  # so that words are aligned
    target = out.reshape(len(out), -1)
    if rows.itemsize == 1 and rows.shape[1] % 8 == 0:
        # Eight bytes at a time, the other end first: 2.5 times as fast as one by one.
        rows, target = rows.view("<u8"), target.view(">u8")
    target[...] = rows[:, ::-1]


@dataclass(frozen=True, kw_only=True)
class Column:
    """What is read of a sample pixel by pixel.

    `files`: the extensions that its file may have; `dtype` and `depth`, () or (3,), of the pixels
    [h, w, *depth]; `method` resizes them; `may_be_smaller` than what else belongs to the sample.
    """

    files: tuple[str, ...]
    method: Image.Resampling
    dtype: type[np.generic] = np.uint8
    depth: tuple[int, ...] = ()
    may_be_smaller: bool = False

    def decode(self, data: Bytes, flipped: bool, scratch: Scratch | None) -> np.ndarray:
        """The pixels as `View.cut` wants them for a view that is flipped or not."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Colours(Column):
    """A picture in RGB."""

    depth: tuple[int, ...] = (3,)

    def decode(self, data: Bytes, flipped: bool, scratch: Scratch | None) -> np.ndarray:
        return decode(data, channels="BGR" if flipped else "RGB", scratch=scratch)


@dataclass(frozen=True, kw_only=True)
class Map(Column):
    """One number for each pixel of the image, in a PNG that `read` decodes."""

    read: Callable[[Bytes], np.ndarray]

    def decode(self, data: Bytes, flipped: bool, scratch: Scratch | None) -> np.ndarray:
        return self.read(data)


# In the order in which they are read: the first one of a batch decides where the others are cut.
# Numbers of classes cannot be blended, so label maps are resized to the nearest pixel.
COLUMNS: dict[str, Column] = {
    "image": Colours(files=IMAGE_EXTENSIONS, method=Image.Resampling.LANCZOS),
    "seg.png": Map(files=("seg.png",), read=decode_labels, method=Image.Resampling.NEAREST),
    "depth.png": Map(
        files=("depth.png",),
        read=decode_depth,
        dtype=np.float32,
        method=Image.Resampling.BILINEAR,
    ),
    "edges.png": Map(files=("edges.png",), read=decode_edges, method=Image.Resampling.LANCZOS),
    "lr": Colours(
        files=tuple(f"lr.{extension}" for extension in IMAGE_EXTENSIONS),
        method=Image.Resampling.BICUBIC,
        may_be_smaller=True,
    ),
}


class Crop(Protocol):
    """Which part of an image is used: left, top, width, height in pixels of the image."""

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        """`words` [23] are random in [0, 2^64); the same ones give the same box."""
        ...


@dataclass(frozen=True)
class CenterCrop:
    """The middle, as large as fits."""

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        return _largest_square(height, width, size, lambda spare, _: spare // 2, words)


@dataclass(frozen=True)
class RandomCrop:
    """A square as large as fits, anywhere."""

    def box(
        self, height: int, width: int, size: int, words: Sequence[int]
    ) -> tuple[float, float, float, float]:
        return _largest_square(
            height, width, size, lambda spare, word: _below(spare + 1, word), words
        )


@dataclass(frozen=True)
class RandomResizedCrop:
    """A rectangle of a random share of the area and a random shape, anywhere (Szegedy et al. 2015).

    `scale`: share of the area, uniform; `ratio`: width by height, uniform in its logarithm. After
    ten draws that do not fit, the middle.
    """

    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(
                f"data.crop_scale is {list(self.scale)} but must be two shares of the area, the "
                f"smaller first, above 0 and up to 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(
                f"data.crop_ratio is {list(self.ratio)} but must be two ratios of width to "
                f"height, the smaller first"
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


def _largest_square(
    height: int,
    width: int,
    size: int,
    place: Callable[[int, int], int],
    words: Sequence[int],
) -> tuple[float, float, float, float]:
    """The box that gives `size` pixels of an image resized to that short side, `place` in it."""
    resized_height, resized_width = _resized(height, width, size)
    across, down = width / resized_width, height / resized_height
    left, top = place(resized_width - size, words[1]), place(resized_height - size, words[0])
    return left * across, top * down, size * across, size * down


def _below(limit: int, word: int) -> int:
    """A number in [0, limit): the high bits of a word scaled to the range, no bias to be seen."""
    return word * limit >> 64


NUM_WORDS = 3 + 2 * 10  # top, left, flip, then ten draws of a size


@dataclass(frozen=True)
class Preprocess:
    """Which view of each image is read: a crop, resized to `size` pixels, perhaps flipped."""

    size: int
    crop: Crop = CenterCrop()
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"data.size is {self.size} but must be at least 1")

    def words(self, seed: int, epoch: int, sample: int) -> list[int]:
        """The random words of a sample; a function of the arguments, nothing else."""
        return random_words(seed, PIXELS, epoch, sample, count=NUM_WORDS).tolist()

    def flips(self, words: Sequence[int]) -> bool:
        """Whether the view that these words give is flipped."""
        return self.flip and bool(words[2] >> 63)

    def view(self, height: int, width: int, words: Sequence[int]) -> View:
        """The view of an image of this size that these words give."""
        box = self.crop.box(height, width, self.size, words)
        return View(*box, self.size, self.flips(words))
