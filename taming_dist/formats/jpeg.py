"""What the bytes of a JPEG say before its pixels are decoded, and whether all its pixels are there.

libjpeg goes on after most faults, and paints what it does not find grey or shifted. It only warns,
of faults of form in the same way as of lost picture data, and only the first warning is told.
"""

import struct

import simplejpeg

from taming_dist.formats.storage import Bytes

MAGIC, END = b"\xff\xd8", b"\xff\xd9"
SEGMENT, FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
APPLICATIONS, COMMENT, SCAN = frozenset(range(0xE0, 0xF0)), 0xFE, 0xDA
# Tables of Huffman codes and of quantization, restart interval, comment, what applications add.
BEFORE_FRAMES = frozenset((0xC4, 0xDB, 0xDD, COMMENT, *APPLICATIONS))
# How libjpeg's warnings of what matters begin; the others are of numbers in headers.
NO_END = "Premature end of JPEG file"
CORRUPT = "Corrupt JPEG data: "
LOST = (CORRUPT, "Inconsistent progression")
# The bytes that are left when all blocks are decoded are filling, if only so many of them differ:
# data of a picture, as they are left behind a hole in it, are as good as random.
FILLING_VALUES = 16
HOLE = bytes(16)  # more zero bits than any coded block of a photograph has in a row


def jpeg_size(data: Bytes) -> tuple[int, int] | None:
    """Height and width by the frame header of a Huffman-coded JPEG (ITU-T T.81, B.2.2).

    None if it is no JPEG, has other channels than grey or three of 8 bits, or anything unusual
    before the frame. simplejpeg reads headers too, but lets go of Python's lock for each: a thread
    that waits for it would wake up every time, mostly in vain (4 % of all time).
    """
    if data[:2] != MAGIC:
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


def lost_data(data: Bytes) -> str | None:
    """What libjpeg says of picture data that are missing or damaged; None if all are there.

    Faults of form lose nothing: bytes between the segments of the header, unknown versions of JFIF
    or Adobe's segment, no end mark, filling before the end mark. So the segments of applications
    and what lies between segments are taken out, the end mark is put in, and libjpeg looks again.
    None too if libjpeg cannot read the file at all: that is an error, which it tells anyway.
    """
    bare = _without_extras(bytes(data))
    warning = _warning(bare)
    if warning == NO_END:
        bare += END
        warning = _warning(bare)
    if warning is None or not warning.startswith(LOST) or _is_filling(bare, warning):
        return None
    return warning.removeprefix(CORRUPT)


def _warning(data: bytes) -> str | None:
    """The first that libjpeg warns of; decoding at an eighth of the size takes all data in."""
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return str(error)
    return None


def _without_extras(data: bytes) -> bytes:
    """A JPEG without comments, segments of applications, and bytes between segments, up to its
    first scan; from there on as it is."""
    parts, position = [MAGIC], len(MAGIC)
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        _, kind, length = SEGMENT.unpack_from(data, position)
        if kind in (0x00, 0xFF):
            position += 1
        elif kind == SCAN:
            return b"".join(parts) + data[position:]
        else:
            end = position + 2 + length
            if kind not in APPLICATIONS and kind != COMMENT:
                parts.append(data[position:end])
            position = end
    return data  # without a scan: libjpeg has the word


def _is_filling(data: bytes, warning: str) -> bool:
    """Whether the bytes that a warning is of are filling between the last block and the end mark,
    and no sign of a hole in the data, behind which blocks have other places than their own."""
    words = warning.split()
    if "extraneous" not in words or not warning.endswith("0xd9"):
        return False
    start = data.index(bytes((0xFF, SCAN)))
    end = data.index(END, start)
    left = end - int(words[words.index("extraneous") - 1])
    return len(set(data[left:end])) <= FILLING_VALUES and HOLE not in data[start:left]
