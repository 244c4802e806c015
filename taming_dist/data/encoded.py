"""Images and maps in their files: first the size is read, and later the pixels.

simplejpeg decodes what it can (bit-identical to Pillow, 1.5 times as fast), Pillow the rest. EXIF
rotation is not applied, as in the original. Whatever is wrong with a file is `BrokenData`. Imports
no torch: the process that decodes has to start quickly.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from taming_dist.data.faults import BrokenData
from taming_dist.data.storage import Bytes

Reading = TypeVar("Reading", bound=Callable[..., Any])
Channels = Literal["RGB", "BGR"]
MAX_PIXELS = 2**26  # 8192 x 8192: larger images are taken for decompression bombs
JPEG_MAGIC = b"\xff\xd8"
SEGMENT, FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
# Tables of Huffman codes and of quantization, restart interval, comment, what applications add.
BEFORE_FRAMES = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
FORMATS = ("JPEG", "PNG", "WEBP")  # the few of Pillow's decoders that data may reach


class Encoded(Protocol):
    """An image or a map in its file. What was read from bytes has to be there until `pixels`."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        """Decode, once: an image to uint8 [h, w, 3], a map to [h, w]. A `buffer`, uint8, is used if
        it is large enough. Raises `BrokenData` if the bytes are cut or damaged."""
        ...


def as_broken_data(what: str) -> Callable[[Reading], Reading]:
    """Have a function raise `BrokenData` whatever is wrong: damaged files give a dozen types."""

    def wrap(function: Reading) -> Reading:
        @wraps(function)
        def reading(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (BrokenData, MemoryError):
                raise
            except UnidentifiedImageError as error:
                raise BrokenData(f"the {what} is no JPEG, PNG or WebP file") from error
            except Exception as error:
                raise BrokenData(f"the {what} cannot be decoded ({error})") from error

        return cast("Reading", reading)

    return wrap


@as_broken_data("image")
def open_image(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """A JPEG, PNG or WebP.

    `BrokenData` if the bytes are no such image, have more than `max_pixels` pixels, or more than 8
    bits per channel (which a conversion would clip).
    """
    size = jpeg_size(data)
    if size is None:
        return _open_with_pillow(data, max_pixels)
    _check_size(*size, max_pixels)
    return _Jpeg(data, size)


@as_broken_data("label map")
def open_labels(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """A label map, a PNG of one channel or with a palette: class ids, uint8 [h, w]."""
    return _open_map(data, ("L", "P"), "one 8-bit channel", max_pixels)


@as_broken_data("edge map")
def open_edges(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Edges, a PNG of one channel of 8 bits: uint8 [h, w]; 255 is an edge."""
    return _open_map(data, ("L",), "one 8-bit channel", max_pixels)


@as_broken_data("depth map")
def open_depth(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """A depth map, a PNG of one channel of 8 or 16 bits: fp32 [h, w] in [0, 1].

    1 is the largest number that the file's bits can hold; nothing is rescaled per image.
    """
    modes = ("L", "I", "I;16", "I;16B")
    return _Depth(_open_map(data, modes, "one channel of 8 or 16 bits", max_pixels).image)


class _Jpeg(NamedTuple):
    """A JPEG with nothing unusual in its header."""

    data: Bytes
    size: tuple[int, int]

    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        if buffer is not None and 3 * self.size[0] * self.size[1] > len(buffer):
            buffer = None
        try:
            pixels = simplejpeg.decode_jpeg(self.data, colorspace=channels, buffer=buffer)
        except ValueError:  # only nearly a JPEG
            pixels = self._pixels_by_pillow(channels)
        if pixels.shape[:2] != self.size:
            raise BrokenData("the headers of the image contradict each other")
        return pixels

    @as_broken_data("image")
    def _pixels_by_pillow(self, channels: Channels) -> np.ndarray:
        return _open_with_pillow(self.data, max_pixels=math.prod(self.size)).pixels(channels)


class _Opened(NamedTuple):
    """A file that Pillow has opened."""

    image: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.height, self.image.width


class _Image(_Opened):
    """An image that Pillow has opened."""

    @as_broken_data("image")
    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        with self.image:
            pixels = np.array(self.image.convert("RGB"))
        return pixels if channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


class _Map(_Opened):
    """A map that Pillow has opened."""

    @as_broken_data("map")
    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        with self.image:
            return np.array(self.image)


class _Depth(_Map):
    """A depth map that Pillow has opened."""

    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        depth = super().pixels()
        return depth.astype(np.float32) / np.float32(255 if depth.dtype == np.uint8 else 65535)


def jpeg_size(data: Bytes) -> tuple[int, int] | None:
    """Height and width by the frame header of a Huffman-coded JPEG (ITU-T T.81, B.2.2).

    None if it is no JPEG, has other channels than grey or three of 8 bits, or anything unusual
    before the frame. simplejpeg reads headers too, but lets go of Python's lock for each: a thread
    that waits for it would wake up every time, mostly in vain (4 % of all time).
    """
    if data[:2] != JPEG_MAGIC:
        return None
    position = 2
    while position + 10 <= len(data):
        mark, kind, length = SEGMENT.unpack_from(data, position)
        if mark == 0xFF and kind in FRAMES:
            precision, height, width, channels = FRAME.unpack_from(data, position + 4)
            usual = precision == 8 and height and width and channels in (1, 3)
            return (height, width) if usual else None
        if mark != 0xFF or kind not in BEFORE_FRAMES:
            return None
        position += 2 + length
    return None


def _open_with_pillow(data: Bytes, max_pixels: int) -> _Image:
    image = _opened(data, max_pixels)
    if image.mode[0] in "IF":
        raise BrokenData(f"pixels of mode {image.mode}: only 8 bits are read")
    return _Image(image)


def _open_map(data: Bytes, modes: Sequence[str], needed: str, max_pixels: int) -> _Map:
    image = _opened(data, max_pixels)
    if image.mode not in modes:
        raise BrokenData(f"a map of mode {image.mode}, but {needed} is needed")
    return _Map(image)


def _opened(data: Bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.height, image.width, max_pixels)
    return image


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BrokenData(f"{width} x {height} pixels, more than {max_pixels}: refused as a bomb")
