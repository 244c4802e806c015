import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from taming_dist.formats.encoded import open_depth, open_image, open_labels
from taming_dist.formats.faults import BrokenData, LostData
from taming_dist.formats.jpeg import jpeg_size

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"),
     ("P", "PNG"), ("LA", "PNG"), ("RGB", "WEBP")],
)  # fmt: skip
def test_every_kind_of_image_becomes_what_pillow_makes_of_it(mode: str, kind: str) -> None:
    data = encode(Image.fromarray(PIXELS).convert(mode), kind)
    assert np.array_equal(open_image(data).pixels(), by_pillow(data))


def test_damaged_cut_deep_and_huge_images_are_broken_data() -> None:
    whole = encode(Image.fromarray(PIXELS), "JPEG")
    deep = encode(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "PNG")
    png = encode(Image.fromarray(PIXELS), "PNG")
    for data in (b"", b"no image", whole[:-200], whole[:3], png[:-30], deep):
        with pytest.raises(BrokenData):
            open_image(data).pixels()
    for data in (whole, png):
        with pytest.raises(BrokenData, match="bomb"):
            open_image(data, max_pixels=239)


def test_label_maps_keep_their_numbers() -> None:
    labels = PIXELS[:, :, 0]
    assert np.array_equal(open_labels(encode(Image.fromarray(labels), "PNG")).pixels(), labels)
    palette = Image.fromarray(labels)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert np.array_equal(open_labels(encode(palette, "PNG")).pixels(), labels)
    with pytest.raises(BrokenData, match="RGB"):
        open_labels(encode(Image.fromarray(PIXELS), "PNG"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_channels_come_in_the_order_asked_for_and_a_buffer_is_used_again(kind: str) -> None:
    data, buffer = encode(Image.fromarray(PIXELS), kind), np.empty(720, np.uint8)
    expected = by_pillow(data)
    for channels in ("RGB", "BGR", "RGB"):
        found = open_image(data).pixels(channels, buffer)
        assert np.array_equal(found, expected if channels == "RGB" else expected[..., ::-1])
        assert np.shares_memory(found, buffer) == (kind == "JPEG")
    found = open_image(data).pixels(buffer=buffer[:-1])
    assert np.array_equal(found, expected)
    assert not np.shares_memory(found, buffer)


def test_the_size_is_known_before_the_pixels_are_read() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert open_image(encode(Image.fromarray(PIXELS), kind)).size == (12, 20)
    assert open_labels(encode(Image.fromarray(PIXELS[:, :, 0]), "PNG")).size == (12, 20)
    cut = encode(Image.fromarray(PIXELS), "JPEG")[:-200]
    assert open_image(cut).size == (12, 20)
    with pytest.raises(LostData, match="damaged: premature end of data segment"):
        open_image(cut).pixels()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"comment": b"a" * 300},
     {"exif": b"Exif\0\0" + bytes(5000)}, {"icc_profile": bytes(70_000)},
     {"restart_marker_blocks": 1}],
    ids=lambda options: next(iter(options), "plain"),
)  # fmt: skip
def test_the_size_of_a_jpeg_is_read_from_its_frame_header(mode: str, options: dict) -> None:
    data = encode(Image.new(mode, (300, 2)), "JPEG", **options)
    assert jpeg_size(data) == simplejpeg.decode_jpeg_header(data)[:2] == (2, 300)
    assert jpeg_size(memoryview(data)) == (2, 300)


def test_pillow_gets_every_jpeg_with_an_unusual_header() -> None:
    data = encode(Image.fromarray(PIXELS), "JPEG")
    frame = data.index(b"\xff\xc0")
    filled = data[:frame] + b"\xff" + data[frame:]  # T.81, B.1.1.2: any marker may be so preceded
    assert jpeg_size(filled) is None
    assert np.array_equal(open_image(filled).pixels(), by_pillow(data))
    assert jpeg_size(encode(Image.new("CMYK", (4, 4)), "JPEG")) is None
    for place, byte in ((1, 0xC3), (4, 12), (9, 2)):  # lossless, 12 bits, two channels
        changed = bytearray(data)
        changed[frame + place] = byte
        assert jpeg_size(changed) is None
    for stop in range(frame + 10):
        assert jpeg_size(data[:stop]) is None
    assert jpeg_size(data[:frame] + data[data.index(b"\xff\xda") :]) is None


def test_an_image_whose_headers_contradict_each_other_is_broken_data() -> None:
    large = encode(Image.fromarray(PIXELS), "JPEG")
    small = encode(Image.fromarray(PIXELS[:8, :8]), "JPEG")
    image = open_image(large)
    assert isinstance(image, tuple)
    with pytest.raises(BrokenData, match="contradict"):
        image._replace(data=small).pixels()


def test_what_only_pillow_reads_of_a_jpeg_is_read_by_pillow() -> None:
    data = bytearray(encode(Image.new("RGB", (24, 8), (128, 128, 128)), "JPEG", subsampling=0))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 14] = 0x21  # two blocks of one channel to each of the others
    bits = "001010" + "0000" * 3  # each block: no change, and nothing else in it
    data[scan + 14 :] = int(2 * bits + "1" * 4, 2).to_bytes(5, "big") + b"\xff\xd9"
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(data)
    assert np.array_equal(open_image(data).pixels(), np.full((8, 24, 3), 128))


def png_chunk(png: bytes, kind: bytes) -> slice:
    """Where the data of the first chunk of a kind are."""
    start = png.index(kind) + 4
    return slice(start, start + int.from_bytes(png[start - 8 : start - 4], "big"))


def test_a_png_is_damaged_if_its_pixels_are_and_not_if_only_a_checksum_is() -> None:
    whole = encode(Image.fromarray(PIXELS), "PNG")
    data = png_chunk(whole, b"IDAT")
    changed = bytearray(whole)
    changed[data.stop - 20] ^= 1
    for damaged in (whole[: data.stop - 30], whole[: data.stop - 30] + whole[-12:], changed):
        with pytest.raises(BrokenData):
            open_image(damaged).pixels()
    # The pixels have a checksum of their own (RFC 1950, Adler-32), which is right.
    changed = bytearray(whole)
    changed[data.stop] ^= 1
    assert np.array_equal(open_image(changed).pixels(), PIXELS)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_depth_is_a_share_of_what_its_bits_can_hold(dtype: type, top: int) -> None:
    values = np.array([[0, 1, top // 2, top]], dtype=dtype)
    depth = open_depth(encode(Image.fromarray(values), "PNG")).pixels()
    assert depth.dtype == np.float32
    assert np.allclose(depth, values / top, atol=1e-7)
    with pytest.raises(BrokenData, match="a map of mode RGB"):
        open_depth(encode(Image.fromarray(PIXELS), "PNG"))
