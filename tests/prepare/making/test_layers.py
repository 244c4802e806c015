import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taming_dist.formats.encoded import open_image
from taming_dist.prepare.making import layers
from taming_dist.prepare.making.layers import (
    Unfit,
    open_depth,
    open_edges,
    open_labels,
    open_picture,
)
from tests.data import damage

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(
        out, format, **options
    )
    return out.getvalue()


def raw_png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG with any header, also such as Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(
    ("image", "format", "extension", "notes"),
    [
        (Image.fromarray(PIXELS), "JPEG", "jpg", ()),
        (Image.fromarray(PIXELS), "PNG", "png", ()),
        (Image.fromarray(PIXELS), "WEBP", "webp", ()),
        (Image.fromarray(PIXELS).convert("L"), "JPEG", "jpg", ("greyscale",)),
        (Image.fromarray(PIXELS).convert("1"), "PNG", "png", ("greyscale",)),
        (Image.fromarray(PIXELS).convert("CMYK"), "JPEG", "jpg", ("CMYK",)),
        (Image.fromarray(PIXELS).convert("RGBA"), "PNG", "png", ("transparent",)),
        (Image.fromarray(PIXELS).convert("LA"), "PNG", "png", ("greyscale", "transparent")),
        (Image.fromarray(PIXELS).convert("P"), "PNG", "png", ()),
    ],
)
def test_what_a_reader_can_decode_keeps_its_bytes(
    image: Image.Image, format: str, extension: str, notes: tuple[str, ...]
) -> None:
    data = encode(image, format)
    picture = open_picture(data)
    assert picture.layer.encode(95) is data
    assert (picture.layer.extension, picture.notes) == (extension, notes)
    assert np.array_equal(picture.layer.pixels, open_image(data).pixels())


def test_16_bits_become_the_8_high_ones() -> None:
    deep = rng.integers(0, 65536, (24, 32, 3), dtype=np.uint16)
    rows = [row.astype(">u2").tobytes() for row in deep]
    for data, expected in (
        (encode(deep[:, :, 0], "PNG"), np.repeat(deep[:, :, :1] >> 8, 3, axis=2)),
        (raw_png(32, 24, 16, b"".join(b"\0" + row for row in rows)), deep >> 8),
    ):
        picture = open_picture(data)
        assert "16 bits to 8" in picture.notes
        assert np.array_equal(open_image(picture.layer.encode(95)).pixels(), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_turned_as_pillow_does(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[layers.ORIENTATION] = orientation
    data = encode(PIXELS, format, exif=exif.tobytes())
    picture = open_picture(data)
    if orientation == 1:
        assert picture.turn is None
        return
    assert picture.turn is not None
    turned = picture.layer.turned(picture.turn)
    with Image.open(io.BytesIO(data)) as image:
        upright = Image.new("RGB", image.size)
        upright.paste(image.convert("RGB"))
        methods = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }
        assert np.array_equal(turned.pixels, np.array(upright.transpose(methods[orientation])))
    # What is stored says of itself that it is upright.
    assert open_picture(turned.encode(95)).turn is None


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def with_text(kind: str) -> bytes:
    """A picture that is turned by what a chunk of text says, or EXIF behind its pixels."""
    exif = Image.Exif()
    exif[layers.ORIENTATION] = 6
    if kind == "exif behind the pixels":
        plain, raw = encode(PIXELS, "PNG"), exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = b"eXIf" + raw
        last = struct.pack(">I", len(raw)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return plain[:-12] + last + plain[-12:]
    info = PngInfo()
    if kind == "raw profile":
        data = exif.tobytes()
        info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    elif kind == "xmp":
        info.add_itxt("XML:com.adobe.xmp", XMP)
    elif kind == "WebP, xmp":
        return encode(PIXELS, "WEBP", xmp=XMP.encode())
    elif kind == "JPEG, xmp":
        return encode(PIXELS, "JPEG", xmp=XMP.encode())
    return encode(PIXELS, "PNG", pnginfo=info)


@pytest.mark.parametrize(
    "kind", ["exif behind the pixels", "raw profile", "xmp", "WebP, xmp", "JPEG, xmp"]
)
def test_an_orientation_counts_wherever_the_file_keeps_it(kind: str) -> None:
    picture = open_picture(with_text(kind))
    assert picture.turn is layers.UPRIGHT[6]
    assert open_picture(picture.layer.turned(picture.turn).encode(95)).turn is None
    assert open_picture(with_text("no metadata")).turn is None


def frames(format: str) -> bytes:
    others = [Image.new("RGB", (32, 24), (9, 9, 9))]
    return encode(Image.fromarray(PIXELS), format, save_all=True, append_images=others)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"no image at all", "unreadable"),
        (encode(PIXELS, "GIF"), "unreadable"),
        (encode(PIXELS, "JPEG")[:-200], "damaged"),
        (damage.cut(encode(PIXELS, "JPEG")), "damaged"),
        (encode(PIXELS, "PNG")[:-200], "truncated"),
        (encode(PIXELS, "WEBP")[:-200], "unreadable"),
        (frames("PNG"), "animated"),
        (frames("WEBP"), "animated"),
        (b"\x93NUMPY\x01\x00", "unreadable"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_kind(data: bytes, kind: str) -> None:
    with pytest.raises(Unfit) as caught:
        open_picture(data)
    assert caught.value.kind == kind
    assert caught.value.reason


def test_what_is_left_of_a_damaged_jpeg_becomes_a_whole_one_where_it_is_wanted() -> None:
    whole = damage.encode("JPEG")
    picture = open_picture(damage.cut(whole), use_damaged=True)
    assert picture.notes == ("damaged",)
    stored = open_image(picture.layer.encode(95)).pixels()
    there = open_image(whole).pixels()[:48]
    assert np.abs(stored[:48].astype(int) - there).mean() < 4
    assert open_picture(whole, use_damaged=True).layer.encode(95) is whole


def test_a_photo_with_a_preview_behind_it_is_no_animation() -> None:
    data = frames("MPO")
    assert open_picture(data).layer.encode(95) is data


@pytest.mark.parametrize("side", [9000, 20000])
def test_a_decompression_bomb_is_refused_unseen(side: int) -> None:
    data = raw_png(side, side, 8, b"")
    with pytest.raises(Unfit) as caught:
        open_picture(data)
    assert caught.value.kind == "too large"


@pytest.mark.parametrize("shape", [(1, 3, 24, 32), (3, 24, 32), (24, 32, 3)])
def test_arrays_of_celeba_hq_become_png(shape: tuple[int, ...]) -> None:
    out = io.BytesIO()
    array = PIXELS if shape == (24, 32, 3) else PIXELS.transpose(2, 0, 1).reshape(shape)
    np.save(out, array)
    picture = open_picture(out.getvalue())
    assert np.array_equal(open_image(picture.layer.encode(95)).pixels(), PIXELS)


def test_an_array_is_never_unpickled() -> None:
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Unfit) as caught:
        open_picture(out.getvalue())
    assert caught.value.kind == "unreadable"


def test_label_maps_keep_their_bytes_or_are_shifted() -> None:
    labels = np.array([[0, 90, 255] * 4] * 12, dtype=np.uint8)
    data = encode(labels, "PNG")
    assert open_labels(data, 0).encode(95) is data
    shifted = np.array(Image.open(io.BytesIO(open_labels(data, 1).encode(95))))
    assert np.array_equal(np.unique(shifted), [0, 1, 91])


def test_depth_of_8_or_16_bits_keeps_its_bytes() -> None:
    for dtype in (np.uint8, np.uint16):
        depth = rng.integers(0, np.iinfo(dtype).max, (24, 32), dtype=dtype)
        data = encode(depth, "PNG")
        layer = open_depth(data)
        assert layer.encode(95) is data
        assert layer.pixels.dtype == dtype
        assert np.array_equal(layer.pixels, depth)


def test_scaled_depth_keeps_its_16_bits() -> None:
    ramp = np.tile(np.linspace(1000, 60000, 64).astype(np.uint16), (64, 1))
    scaled = open_depth(encode(ramp, "PNG")).scaled(16)
    stored = np.array(Image.open(io.BytesIO(scaled.encode(95)))).astype(np.int64)
    assert stored.shape == (16, 16)
    assert np.abs(stored[8] - ramp.reshape(64, 16, 4).mean(axis=2)[8]).max() < 700


def test_depth_packed_as_float32_in_rgba_becomes_16_bits() -> None:
    depth = rng.normal(size=(24, 32)).astype("<f4")
    packed = depth.view(np.uint8).reshape(24, 32, 4)
    stored = np.array(Image.open(io.BytesIO(open_depth(encode(packed, "PNG")).encode(95))))
    expected = (depth - depth.min()) / (depth.max() - depth.min()) * 65535
    assert stored.dtype == np.uint16
    assert np.abs(stored - expected).max() <= 0.51


def test_maps_that_are_coloured_cut_or_huge_are_refused() -> None:
    colour, grey = encode(PIXELS, "PNG"), encode(PIXELS[:, :, 0], "PNG")
    bomb = raw_png(20000, 20000, 8, b"")
    for open_map in (open_depth, open_edges, lambda data: open_labels(data, 0)):
        for data in (colour, grey[:-100], bomb, b""):
            with pytest.raises(Unfit):
                open_map(data)
