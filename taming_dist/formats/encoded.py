"""Encoded images and maps: the size is read first, the pixels later.

simplejpeg decodes what it can (bit-identical to Pillow, 1.5 times as fast), Pillow the rest. EXIF
rotation is not applied, as in the original. Any defect of a file is a `BrokenData`; if only part
of a JPEG is lost it is a `LostData`, and the rest can still be decoded. Does not import torch: the
decoding process has to start quickly.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from taming_dist.formats.faults import BrokenData, LostData
from taming_dist.formats.jpeg import END, MAGIC, jpeg_size, lost_data
from taming_dist.formats.storage import Bytes

Reading = TypeVar("Reading", bound=Callable[..., Any])
Channels = Literal["RGB", "BGR"]
MAX_PIXELS = 2**26  # 8192 x 8192: larger images are treated as decompression bombs
FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders of Pillow that data may reach


class Encoded(Protocol):
    """An encoded image or map. The bytes that it was opened from must stay valid until `pixels`."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        """Decode an image to uint8 [h, w, 3], a map to [h, w].

        A uint8 `buffer` is used if it is large enough.

        Raises:
            BrokenData: the bytes are truncated or damaged, a `LostData` if `rest` can decode what
                is left.
        """
        ...

    def rest(self, channels: Channels = "RGB") -> np.ndarray:
        """Like `pixels`, but decode what is left of a damaged image."""
        ...


def as_broken_data(what: str) -> Callable[[Reading], Reading]:
    """Turn every exception of a function into `BrokenData`: damaged files raise a dozen types."""

    def wrap(function: Reading) -> Reading:
        @wraps(function)
        def reading(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (BrokenData, MemoryError):
                raise
            except UnidentifiedImageError as error:
                raise BrokenData(f"the {what} is not a JPEG, PNG or WebP file") from error
            except Exception as error:
                raise BrokenData(f"the {what} cannot be decoded ({error})") from error

        return cast("Reading", reading)

    return wrap


@as_broken_data("image")
def open_image(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Open a JPEG, PNG or WebP.

    Raises:
        BrokenData: the bytes are not such an image, have more than `max_pixels` pixels, or more
            than 8 bits per channel (which a conversion would clip).
    """
    size = jpeg_size(data)
    if size is None:
        return _open_with_pillow(data, max_pixels)
    _check_size(*size, max_pixels)
    return _Jpeg(data, size)


@as_broken_data("label map")
def open_labels(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Open a label map, a PNG with one channel or a palette: class ids, uint8 [h, w]."""
    return _open_map(data, ("L", "P"), "one 8-bit channel", max_pixels)


@as_broken_data("edge map")
def open_edges(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Open an edge map, a PNG with one 8-bit channel: uint8 [h, w]; 255 is an edge."""
    return _open_map(data, ("L",), "one 8-bit channel", max_pixels)


@as_broken_data("depth map")
def open_depth(data: Bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Open a depth map, a PNG with one channel of 8 or 16 bits: fp32 [h, w] in [0, 1].

    1 is the largest number that the file's bits can hold; nothing is rescaled per image.
    """
    modes = ("L", "I", "I;16", "I;16B")
    return _Depth(*_open_map(data, modes, "one channel of 8 or 16 bits", max_pixels))


class _Jpeg(NamedTuple):
    """A JPEG with nothing unusual in its header."""

    data: Bytes
    size: tuple[int, int]

    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        if buffer is not None and 3 * self.size[0] * self.size[1] > len(buffer):
            buffer = None
        try:
            pixels = simplejpeg.decode_jpeg(self.data, colorspace=channels, buffer=buffer)
        except ValueError:  # damaged, or not quite a JPEG
            _check_losses(self.data)
            pixels = self._leniently(channels, _Image.pixels)
        return self._checked(pixels)

    def rest(self, channels: Channels = "RGB") -> np.ndarray:
        return self._checked(self._leniently(channels, _Image.rest))

    @as_broken_data("image")
    def _leniently(
        self, channels: Channels, by_pillow: Callable[[_Image, Channels], np.ndarray]
    ) -> np.ndarray:
        try:
            return simplejpeg.decode_jpeg(self.data, colorspace=channels, strict=False)
        except ValueError:  # beyond libjpeg's simple interface
            return by_pillow(_open_with_pillow(self.data, math.prod(self.size)), channels)

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[:2] != self.size:
            raise BrokenData("the headers of the image contradict one another")
        return pixels


class _Opened(NamedTuple):
    """A file that Pillow has opened."""

    image: Image.Image
    data: Bytes

    @property
    def size(self) -> tuple[int, int]:
        return self.image.height, self.image.width


class _Image(_Opened):
    """An image that Pillow has opened."""

    @as_broken_data("image")
    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        if self.data[:2] == MAGIC:
            _check_losses(self.data)
        return _converted(self.image, channels)

    @as_broken_data("image")
    def rest(self, channels: Channels = "RGB") -> np.ndarray:
        image = self.image
        if self.data[:2] == MAGIC and bytes(self.data[-2:]) != END:  # Pillow would refuse it
            image = _opened(b"".join((self.data, END)), math.prod(self.size))
        return _converted(image, channels)


class _Map(_Opened):
    """A map that Pillow has opened."""

    @as_broken_data("map")
    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        with self.image:
            return np.array(self.image)

    def rest(self, channels: Channels = "RGB") -> np.ndarray:
        return self.pixels(channels)


class _Depth(_Map):
    """A depth map that Pillow has opened."""

    def pixels(self, channels: Channels = "RGB", buffer: np.ndarray | None = None) -> np.ndarray:
        return depth_shares(super().pixels())


def depth_shares(depth: np.ndarray) -> np.ndarray:
    """Depth of 8 or 16 bits [h, w] as fp32 in [0, 1], see `open_depth`."""
    return depth.astype(np.float32) / np.float32(255 if depth.dtype == np.uint8 else 65535)


def _open_with_pillow(data: Bytes, max_pixels: int) -> _Image:
    image = _opened(data, max_pixels)
    if image.mode[0] in "IF":
        raise BrokenData(f"pixels of mode {image.mode}: only 8 bits per channel are supported")
    return _Image(image, data)


def _open_map(data: Bytes, modes: Sequence[str], needed: str, max_pixels: int) -> _Map:
    image = _opened(data, max_pixels)
    if image.mode not in modes:
        raise BrokenData(f"a map of mode {image.mode}, but {needed} is needed")
    return _Map(image, data)


def _opened(data: Bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.height, image.width, max_pixels)
    return image


def _converted(image: Image.Image, channels: Channels) -> np.ndarray:
    with image:
        pixels = np.array(image.convert("RGB"))
    return pixels if channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


@as_broken_data("image")
def _check_losses(data: Bytes) -> None:
    """Raise `LostData` if part of the picture is missing from a JPEG."""
    lost = lost_data(data)
    if lost is not None:
        raise LostData(f"the image is damaged: {lost}")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BrokenData(
            f"{width} x {height} pixels, more than {max_pixels}: refused as a decompression bomb"
        )
