"""Which faults of a JPEG lose a part of its picture. For its size see test_encoded.py."""

import numpy as np
import pytest
import simplejpeg

from taming_dist.formats.encoded import open_image
from taming_dist.formats.faults import LostData
from taming_dist.formats.jpeg import lost_data
from tests.data.damage import END, cut, data_of, encode, with_hole

KINDS = {
    "baseline": {},
    "fine": {"quality": 95},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


def add_before(data: bytes, mark: bytes, what: bytes) -> bytes:
    place = data.index(mark)
    return data[:place] + what + data[place:]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_jpeg_that_lacks_a_part_of_its_picture_is_not_decoded(options: dict) -> None:
    whole = encode("JPEG", **options)
    damaged = [cut(whole), cut(whole, 0.9), cut(whole)[:-2]]
    damaged += [
        with_hole(whole, start, stop) for start, stop in ((0.4, 0.6), (0.7, 0.75), (0.5, 1))
    ]
    for data in damaged:
        image = open_image(data)
        assert image.size == (144, 192)
        with pytest.raises(LostData, match="the image is damaged: "):
            image.pixels()
        # What is left can be had, if somebody wants it: the first rows are right.
        left = image.rest().astype(int)
        assert left.shape == (144, 192, 3)
        if "progressive" not in options:
            assert np.array_equal(left[:16], open_image(whole).pixels()[:16])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_jpeg_with_faults_of_form_only_is_decoded_as_if_it_had_none(options: dict) -> None:
    whole = encode("JPEG", **options)
    end = whole.rindex(END)
    formal = {
        "filling before the end": whole[:end] + bytes(3) + END,
        "much filling before the end": whole[:end] + b"end of file " * 9 + END,
        "bytes between segments": add_before(whole, b"\xff\xdb", b"junk"),
        "bytes before the data": add_before(whole, b"\xff\xda", b"\0\0"),
        "a later version of JFIF": whole.replace(b"JFIF\0\1", b"JFIF\0\3"),
        "behind the end": whole + b"a trailer" * 50,
    }
    if options.get("mode") != "CMYK":  # which only Pillow reads
        formal["no end mark"] = whole[:end]
    expected = open_image(whole).pixels()
    for fault, data in formal.items():
        assert lost_data(data) is None, fault
        if not (options.get("mode") == "CMYK" and fault == "bytes between segments"):
            assert np.array_equal(open_image(data).pixels(), expected), fault


def test_a_fault_of_form_does_not_hide_damage() -> None:
    """libjpeg tells the first of its warnings only."""
    for whole in (encode("JPEG"), encode("JPEG", progressive=True)):
        junk = add_before(cut(whole), b"\xff\xdb", b"junk")
        later = with_hole(whole, 0.4, 0.6).replace(b"JFIF\0\1", b"JFIF\0\3")
        for data in (junk, later):
            with pytest.raises(LostData):
                open_image(data).pixels()


def test_data_that_are_left_over_behind_a_change_are_lost() -> None:
    """Blocks got lost in the middle, and those behind lie in the wrong places."""
    whole = encode("JPEG", quality=95)
    start = data_of(whole)
    middle = start + (len(whole) - start) // 3
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 255, 200, np.uint8).tobytes()
        changed = whole[:middle] + noise + whole[middle + 200 :]
        with pytest.raises(ValueError, match="Corrupt"):
            simplejpeg.decode_jpeg(changed)
        assert lost_data(changed) is not None


def test_a_whole_jpeg_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = simplejpeg.decode_jpeg

    def count(*args: object, **options: object) -> np.ndarray:
        decoded.append(args)
        return decode(*args, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", count)
    for options in ({}, {"progressive": True}, {"mode": "L"}):
        open_image(encode("JPEG", **options)).pixels()
    assert len(decoded) == 3
