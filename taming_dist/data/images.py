"""Images: from encoded bytes to the uint8 crops that networks are fed with.

simplejpeg decodes what it can (bit-identical to Pillow, 1.5 times as fast), Pillow the rest.
A label map is cut and flipped exactly as its image. EXIF rotation is not applied, as in the
original. Random numbers depend on seed, epoch and sample only.
"""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from taming_dist.data.faults import BrokenData
from taming_dist.data.order import PIXELS, random_words
from taming_dist.errors import UserError

MAX_PIXELS = 2**26  # 8192 x 8192: larger images are taken for decompression bombs
JPEG_MAGIC = b"\xff\xd8"
FORMATS = ("JPEG", "PNG", "WEBP")  # the few of Pillow's decoders that data may reach


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a JPEG, PNG or WebP to RGB, uint8 [h, w, 3].

    Raises `BrokenData` if the bytes are no such image, are cut, have more than `max_pixels`
    pixels, or more than 8 bits per channel (which a conversion would clip).
    """
    try:
        pixels = _decode_jpeg(data, max_pixels) if data[:2] == JPEG_MAGIC else None
        if pixels is None:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.width, image.height, max_pixels)
                if image.mode[0] in "IF":
                    raise BrokenData(f"pixels of mode {image.mode}: only 8 bits are read")
                pixels = np.array(image.convert("RGB"))
    except (BrokenData, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenData("no JPEG, PNG or WebP file") from error
    except Exception as error:  # damaged files make decoders raise a dozen types
        raise BrokenData(f"not an image that can be decoded ({error})") from error
    return pixels


def decode_labels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a label map, a PNG of one channel or with a palette, to class ids, uint8 [h, w]."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            if image.mode not in ("L", "P"):
                raise BrokenData(f"a label map of mode {image.mode}: one 8-bit channel is needed")
            return np.array(image)
    except (BrokenData, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenData("the label map is no PNG file") from error
    except Exception as error:
        raise BrokenData(f"not a label map that can be decoded ({error})") from error


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """None where Pillow has to try: CMYK, and files that are only nearly JPEG."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BrokenData(f"{width} x {height} pixels, more than {max_pixels}: refused as a bomb")


def resize_short_side(
    pixels: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Resize uint8 [h, w(, 3)] so that the shorter side has `size` pixels; the same, if it has."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == size:
        return pixels
    shape = (max(size, round(width * size / short)), max(size, round(height * size / short)))
    return np.array(Image.fromarray(pixels).resize(shape, method))


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side to `size`, cut a square at "random" or the "center", perhaps flip."""

    size: int
    crop: str = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop not in ("random", "center"):
            raise UserError(f"data.crop is {self.crop!r} but must be random or center")
        if self.size < 1:
            raise UserError(f"data.size is {self.size} but must be at least 1")

    def __call__(
        self, pixels: np.ndarray, labels: np.ndarray | None, seed: int, epoch: int, sample: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Cut an image [h, w, 3] and its label map [h, w] alike.

        Returns uint8 [3, size, size] and [size, size], not contiguous. The random numbers are a
        function of `seed`, `epoch` and `sample`.
        """
        if labels is not None and labels.shape != pixels.shape[:2]:
            raise BrokenData(f"label map {labels.shape} on an image of {pixels.shape[:2]}")
        pixels = resize_short_side(pixels, self.size)
        top, left, flipped = self._draw(pixels.shape, seed, epoch, sample)
        image = self._cut(pixels, top, left, flipped).transpose(2, 0, 1)
        if labels is None:
            return image, None
        labels = resize_short_side(labels, self.size, Image.Resampling.NEAREST)
        return image, self._cut(labels, top, left, flipped)

    def _draw(
        self, shape: tuple[int, ...], seed: int, epoch: int, sample: int
    ) -> tuple[int, int, bool]:
        spare = (shape[0] - self.size, shape[1] - self.size)
        if self.crop == "center" and not self.flip:
            return spare[0] // 2, spare[1] // 2, False
        words = [int(word) for word in random_words(seed, PIXELS, epoch, sample, count=3)]
        flipped = self.flip and bool(words[2] >> 63)
        if self.crop == "center":
            return spare[0] // 2, spare[1] // 2, flipped
        # The high bits of a word scaled to the range: no division, no bias that could be seen.
        return words[0] * (spare[0] + 1) >> 64, words[1] * (spare[1] + 1) >> 64, flipped

    def _cut(self, pixels: np.ndarray, top: int, left: int, flipped: bool) -> np.ndarray:
        cut = pixels[top : top + self.size, left : left + self.size]
        return cut[:, ::-1] if flipped else cut


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images of any shape into fp32 in [-1, 1], the range all networks work in."""
    return images.float() / 127.5 - 1.0
