"""Reading a JPEG's size without decoding it, and finding out whether any of its data is lost.

libjpeg continues after most faults and fills what is missing with grey or shifted pixels. It only
warns, about formal faults in the same way as about lost data, and reports only the first warning.
"""

import struct

import simplejpeg

from taming_dist.formats.storage import Bytes

MAGIC, END = b"\xff\xd8", b"\xff\xd9"
SEGMENT, FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
APPLICATIONS, COMMENT, SCAN = frozenset(range(0xE0, 0xF0)), 0xFE, 0xDA
# Huffman tables, quantization tables, restart interval, comment, application segments.
BEFORE_FRAMES = frozenset((0xC4, 0xDB, 0xDD, COMMENT, *APPLICATIONS))
# How libjpeg's relevant warnings begin; the others concern numbers in headers.
NO_END = "Premature end of JPEG file"
CORRUPT = "Corrupt JPEG data: "
LOST = (CORRUPT, "Inconsistent progression")
# Bytes left over after all blocks are decoded are padding if at most this many values occur in
# them: real picture data, left over because of a hole, look random.
FILLING_VALUES = 16
HOLE = bytes(16)  # a longer run of zero bits than in any coded block of a photograph


def jpeg_size(data: Bytes) -> tuple[int, int] | None:
    """Height and width from the frame header of a Huffman-coded JPEG (ITU-T T.81, B.2.2).

    None if it is not a JPEG, has channels other than one or three of 8 bits, or anything unusual
    before the frame. simplejpeg reads headers too, but releases Python's lock for each: a waiting
    thread would wake up every time, mostly in vain (4 % of all time).
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
    """What libjpeg reports about missing or damaged picture data; None if nothing is lost.

    Formal faults lose nothing: bytes between header segments, unknown versions of JFIF or Adobe's
    segment, a missing end marker, padding before it. So application segments and whatever lies
    between segments are removed, the end marker is added, and libjpeg looks again. None also if
    libjpeg cannot read the file at all: decoding then reports that error anyway.
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
    """libjpeg's first warning; decoding at an eighth of the size still reads all data."""
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return str(error)
    return None


def _without_extras(data: bytes) -> bytes:
    """A JPEG without comments, application segments and bytes between segments up to its first
    scan; unchanged from there on."""
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
    return data  # no scan: leave it to libjpeg


def _is_filling(data: bytes, warning: str) -> bool:
    """Whether the bytes that a warning is about are padding between the last block and the end
    marker, and not the sign of a hole in the data, behind which blocks are misplaced."""
    words = warning.split()
    if "extraneous" not in words or not warning.endswith("0xd9"):
        return False
    start = data.index(bytes((0xFF, SCAN)))
    end = data.index(END, start)
    left = end - int(words[words.index("extraneous") - 1])
    return len(set(data[left:end])) <= FILLING_VALUES and HOLE not in data[start:left]
