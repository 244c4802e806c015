"""The pixel layers of a sample: the image and its maps.

A layer keeps the bytes of its file until its pixels change, so an unchanged layer is stored byte
for byte. docs/making-shards.md documents what is done with unusual files.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from taming_dist.data.images import resize_short_side
from taming_dist.formats import encoded
from taming_dist.formats.encoded import FORMATS, MAX_PIXELS
from taming_dist.formats.faults import LostData
from taming_dist.placeholders import FIXES, placeholder

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
DAMAGED = "damaged"
ARRAY_MAGIC = b"\x93NUMPY"
ORIENTATION = 0x0112
# The EXIF chunk, and the names of the text chunks that hold EXIF or XMP.
PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
Turn = Callable[[np.ndarray], np.ndarray]
# How to turn the pixels [h, w(, c)] of each EXIF orientation upright (CIPA DC-008, 4.6.5).
UPRIGHT: dict[int, Turn] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


class Unfit(Exception):
    """A file that is left out; `kind` is what the summary counts."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Layer:
    """Pixels uint8 or uint16 [h, w(, 3)], their extension, and their file if it is still exact.

    `resampling` is the filter for scaling the layer down.
    """

    extension: str
    pixels: np.ndarray
    data: bytes | None
    resampling: Image.Resampling = Image.Resampling.LANCZOS

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def turned(self, turn: Turn) -> "Layer":
        """The layer with its pixels turned; a WebP becomes a JPEG."""
        extension = self.extension.replace("webp", "jpg")
        return replace(
            self, extension=extension, pixels=np.ascontiguousarray(turn(self.pixels)), data=None
        )

    def scaled(self, short_side: int) -> "Layer":
        """The layer scaled to a short side; 16-bit pixels are scaled as floats."""
        if self.pixels.dtype == np.uint8:
            pixels = resize_short_side(self.pixels, short_side, self.resampling)
        else:
            exact = resize_short_side(self.pixels.astype(np.float32), short_side, self.resampling)
            pixels = np.rint(exact).clip(0, 65535).astype(np.uint16)
        return replace(self, pixels=pixels, data=None)

    def encode(self, quality: int) -> bytes:
        """The layer's file: the original bytes if unchanged, else a new PNG or JPEG."""
        if self.data is not None:
            return self.data
        out = io.BytesIO()
        image = Image.fromarray(self.pixels)
        if self.extension.endswith("jpg"):
            image.save(out, "JPEG", quality=quality)
        else:
            image.save(out, "PNG")
        return out.getvalue()


@dataclass(frozen=True)
class Picture:
    """An image as stored in its file, the turn that makes it upright, and notes on the file."""

    layer: Layer
    turn: Turn | None
    notes: tuple[str, ...]


def open_picture(data: bytes, use_damaged: bool = False) -> Picture:
    """Decode an image file of any kind.

    `use_damaged`: keep what is left of a damaged JPEG; otherwise it is unfit.

    Raises:
        Unfit: it cannot be used.
    """
    if not data:
        raise Unfit("empty", "the file is empty")
    instead = placeholder(data)
    if instead is not None:
        raise Unfit("unreadable", f"{instead}, not an image: {FIXES[instead]}")
    if data.startswith(ARRAY_MAGIC):
        return Picture(Layer("png", _load_array(data), None), None, ("from an array",))
    with _opened(data) as image:
        notes = _notes(image)
        turn = UPRIGHT.get(_orientation(image, data))
        extension = EXTENSIONS[str(image.format)]
        # A PNG's header states its bits per channel; Pillow's mode does so for greyscale only.
        if extension == "png" and data[24] == 16:
            layer = Layer("png", _to_8_bits(image), None)
            return Picture(layer, turn, (*notes, "16 bits to 8"))
        opened = encoded.open_image(data)
        try:
            return Picture(Layer(extension, opened.pixels(), data), turn, notes)
        except LostData:
            if not use_damaged:
                raise
        rest = Layer("jpg", opened.rest(), None)
        return Picture(rest, turn, (*notes, DAMAGED))


def open_labels(data: bytes, shift: int) -> Layer:
    """Open a label map; `shift` is added to its ids, modulo 256 (255, unlabelled, becomes 0)."""
    with _as_unfit():
        labels = encoded.open_labels(data).pixels()
    if shift:
        return Layer("seg.png", labels + np.uint8(shift), None, Image.Resampling.NEAREST)
    return Layer("seg.png", labels, data, Image.Resampling.NEAREST)


def open_depth(data: bytes) -> Layer:
    """Open a depth map: one channel of 8 or 16 bits.

    Depth packed as float32 into the four channels of an RGBA PNG, as the original stores MiDaS's
    output, is rescaled to 16 bits from its minimum to its maximum.
    """
    with _opened(data) as image:
        if image.mode == "L":
            return Layer("depth.png", np.array(image), data, Image.Resampling.BILINEAR)
        if image.mode.startswith("I"):
            pixels = np.array(image).astype(np.uint16)
            return Layer("depth.png", pixels, data, Image.Resampling.BILINEAR)
        if image.mode == "RGBA":
            pixels = _unpack_depth(np.array(image))
            return Layer("depth.png", pixels, None, Image.Resampling.BILINEAR)
        raise Unfit("pair", f"a depth map of mode {image.mode}: one channel is needed")


def open_edges(data: bytes) -> Layer:
    """Open an edge map: one channel of 8 bits or 1 bit."""
    with _opened(data) as image:
        if image.mode not in ("L", "1"):
            raise Unfit("pair", f"an edge map of mode {image.mode}: one 8-bit channel is needed")
        return Layer("edges.png", np.array(image.convert("L")), data if image.mode == "L" else None)


@contextmanager
def _as_unfit() -> Iterator[None]:
    """Turn whatever a decoder raises into `Unfit`: damaged files raise a dozen types."""
    try:
        yield
    except (Unfit, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Unfit("unreadable", "not a JPEG, PNG or WebP file") from error
    except LostData as error:
        raise Unfit(DAMAGED, str(error)) from error
    except Image.DecompressionBombError as error:
        raise Unfit("too large", "refused as a decompression bomb") from error
    except Exception as error:
        kind = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise Unfit(kind, str(error)) from error


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open a still image of an allowed size; failures within the block become `Unfit` too."""
    with _as_unfit():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            reason = f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}"
            raise Unfit("too large", f"{reason}: refused as a decompression bomb")
        # A JPEG with several pictures is a camera's photo with previews.
        if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
            raise Unfit("animated", "an animation")
        yield image


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.mode[0] in "1LI":
        notes.append("greyscale")
    if image.mode == "CMYK":
        notes.append("CMYK")
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        notes.append("transparent")
    return tuple(notes)


def _orientation(image: Image.Image, data: bytes) -> int:
    """The orientation from EXIF or XMP, wherever the format stores them; 1 if there is none."""
    # Pillow decodes a whole PNG to look for them behind its pixels.
    if image.format == "PNG" and not any(mark in data for mark in PNG_METADATA):
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata are no reason to drop the image
        return 1


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Keep the high byte of 16-bit channels, as Pillow itself does with colour."""
    if not image.mode.startswith("I"):
        return np.array(image.convert("RGB"))
    grey = (np.array(image).astype(np.uint16) >> 8).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _unpack_depth(channels: np.ndarray) -> np.ndarray:
    depth = channels.view("<f4")[:, :, 0].astype(np.float64)
    if not np.isfinite(depth).all():
        raise Unfit("pair", "an RGBA depth map that does not hold float32 numbers")
    low, high = depth.min(), depth.max()
    return np.rint((depth - low) * (65535 / max(high - low, 1e-8))).astype(np.uint16)


def _load_array(data: bytes) -> np.ndarray:
    """Load an image of CelebA-HQ: uint8 [(1,) 3, h, w] or [h, w, 3] as .npy, never unpickled."""
    with _as_unfit():
        array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise Unfit("unreadable", f"an array of {array.dtype} {list(array.shape)}, not RGB")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise Unfit("too large", f"an array of {list(array.shape)}")
    return np.ascontiguousarray(array)
