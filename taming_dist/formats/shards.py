"""WebDataset tar files: writing, walking and indexing them.

Own code, because Python's tarfile silently takes a damaged header for the end of the archive; here
every byte up to the end-of-archive marker is accounted for. Names in a tar are keys, never paths.
Format: POSIX.1-1988 ustar; GNU and pax long names are understood when reading.
"""

import logging
import mmap
import shlex
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tarfile import USTAR_FORMAT, TarInfo
from typing import BinaryIO, NamedTuple
from zlib import adler32

import numpy as np
import xxhash

from taming_dist.atomic import replacing
from taming_dist.errors import UserError
from taming_dist.formats.faults import BrokenData
from taming_dist.formats.manifest import Shard, write_index
from taming_dist.formats.names import escape
from taming_dist.formats.storage import Bytes, is_url, local_copy, shown
from taming_dist.placeholders import refuse_placeholder

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")  # name, size, sum, type, magic, prefix
REGULAR, NO_DATA, EXTENDED, SPARSE = b"\0" + b"07", b"123456", b"xL", b"S"
LINKS = {b"1": "hard link", b"2": "symbolic link"}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class Member(NamedTuple):
    """One file in a tar: `header` is the offset of its header, `start` that of its contents."""

    name: str
    header: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The offset of the next header."""
        return _padded(self.start + self.size)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension, at the first dot of the basename.

    Both are UTF-8 text whatever bytes the name consists of, see `names.escape`. None for names that
    webdataset skips too: no extension, no stem, or `__metadata__`.
    """
    folder, slash, base = escape(name).rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (name.startswith("__") and name.endswith("__")):
        return None
    return folder + slash + stem, extension.lower()


def walk(
    buffer: memoryview, archive: bool = True, links: Counter[str] | None = None
) -> Iterator[Member]:
    """Yield the regular files in a tar or, with `archive=False`, in the bytes of one sample.

    Links are skipped, and counted by their kind in `links`.

    Raises:
        BrokenData: a header is damaged, a member is truncated, or an archive does not end with its
            marker followed by nothing but zeros; names the byte.
    """
    position = header = 0
    extended: dict[str, str] = {}
    while position < len(buffer):
        block = bytes(buffer[position : position + BLOCK])
        if archive and block == ZERO_BLOCK:
            return _check_tail(buffer, position)
        name, size, kind = _parse_header(block, position)
        if extended:
            name, size = extended.get("path", name), int(extended.get("size", size))
        member = Member(name, header, position + BLOCK, size)
        if member.start + size > len(buffer):
            raise BrokenData(f"{name!r}, which starts at byte {header}, is truncated")
        if kind in EXTENDED:
            extended.update(_parse_extended(kind, bytes(buffer[member.start :][:size]), position))
        else:
            if kind in REGULAR:
                yield member
            elif links is not None and kind in LINKS:
                links[LINKS[kind]] += 1
            header, extended = member.end, {}
        position = member.end
    if archive:
        raise BrokenData(f"the tar is truncated: no end-of-archive marker at byte {len(buffer)}")
    return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_tail(buffer: memoryview, position: int) -> None:
    tail = np.frombuffer(buffer[position:], dtype=np.uint8)
    if tail.any():
        raise BrokenData(f"an empty header at byte {position} with data behind it")


def _parse_header(block: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size and type from a 512-byte header whose checksum is verified."""
    try:
        if len(block) < BLOCK:
            raise ValueError("truncated header")
        name, length, checksum, kind, magic, prefix = HEADER.unpack(block)
        if _sum(block) - sum(checksum) + 8 * ord(" ") != _parse_number(checksum):
            raise ValueError("wrong checksum")
        size = 0 if kind in NO_DATA else _parse_number(length)
        if size < 0 or kind == SPARSE:
            raise ValueError("unsupported member")
    except ValueError as error:
        raise BrokenData(f"no tar header at byte {position} ({error})") from error
    is_prefixed = magic == b"ustar\0" and prefix[0]
    return (f"{_text(prefix)}/{_text(name)}" if is_prefixed else _text(name)), size, kind


def _sum(block: bytes) -> int:
    """The sum of 512 bytes, faster than `sum`: the low half of Adler-32 is 1 + the sum modulo
    65521, which 256 bytes cannot reach."""
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2


def _parse_number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):  # GNU: big-endian binary after a marker byte
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.rstrip(b"\0 ").lstrip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _parse_extended(kind: bytes, data: bytes, position: int) -> dict[str, str]:
    """What a GNU long name or pax header states about the next member."""
    if kind == b"L":
        return {"path": _text(data)}
    values = {}
    try:
        while data:
            length = int(data.partition(b" ")[0])
            key, equals, value = data[:length].partition(b" ")[2].partition(b"=")
            if not equals or length < 5:
                raise ValueError("no key")
            values[key.decode()] = value.rstrip(b"\n").decode("utf-8", "surrogateescape")
            data = data[length:]
        if int(values.get("size", 0)) < 0 or "GNU.sparse.major" in values:
            raise ValueError("unsupported member")
    except ValueError as error:
        raise BrokenData(f"damaged pax header at byte {position} ({error})") from error
    return values


def map_file(path: Path) -> memoryview:
    """Map a file into memory, read-only, for as long as a view of it exists."""
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_members(path: Path) -> dict[str, memoryview]:
    """The files in a tar by name, as views of its mapping; `BrokenData` if it is damaged."""
    buffer = map_file(path)
    return {member.name: buffer[member.start :][: member.size] for member in walk(buffer)}


def measure(path: Path) -> tuple[int, str]:
    """Size and xxh3-128 of a file."""
    buffer = map_file(path)
    return len(buffer), xxhash.xxh3_128_hexdigest(buffer)


def scan(path: Path, location: str = "") -> tuple[Shard, np.ndarray]:
    """Read a tar once for its manifest entry and the byte offsets of its samples [samples + 1].

    Consecutive members with the same key form a sample, as in webdataset. `location` is where the
    shard really lies, if `path` is a copy.

    Raises:
        UserError: the tar is truncated, damaged or compressed, or holds no image; names the shard
            and the byte.
    """
    named = shown(location) if location else path
    refuse_placeholder(path, "a shard", str(named))
    buffer = map_file(path)
    offsets = [0]
    columns: Counter[str] = Counter()
    links: Counter[str] = Counter()
    try:
        for offset, extensions, end in _samples(buffer, links):
            offsets[-1:] = [offset, end]
            columns.update(extensions)
    except BrokenData as error:
        raise UserError(
            f"the shard {named} is damaged: {error}; fetch it or make it again"
        ) from error
    if not any(columns[extension] for extension in IMAGE_EXTENSIONS):
        raise UserError(f"the shard {named} holds no image{_found_instead(columns, links)}")
    if links:
        logging.getLogger(__name__).warning("%s: %s", named, _of_links(links))
    size, digest = measure(path)
    shard = Shard(path.name, len(offsets) - 1, size, digest, dict(sorted(columns.items())))
    return shard, np.array(offsets, dtype=np.int64)


def _found_instead(columns: Counter[str], links: Counter[str]) -> str:
    """What a tar without an image holds, and how to turn it into one with images."""
    known = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
    said = f" ({known})"
    if columns:
        some = ", ".join(f".{name}" for name in sorted(columns)[:3])
        more = f" and {len(columns) - 3} other extensions" if len(columns) > 3 else ""
        said += f", only {some}{more}"
    longer = [name for name in sorted(columns) if name.endswith(IMAGE_EXTENSIONS)]
    if longer:
        ending = longer[0].rpartition(".")[2]
        said += (
            f": everything after the first dot of a name is its column, so pack the files as "
            f"KEY.{ending} (tar --transform {shlex.quote(f's/[.]{longer[0]}$/.{ending}/')})"
        )
    return f"{said}; {_of_links(links)}" if links else said


def _of_links(links: Counter[str]) -> str:
    counted = " and ".join(
        f"{number} {kind}{'s' if number > 1 else ''}" for kind, number in sorted(links.items())
    )
    return (
        f"{counted} in the tar: links are not followed, pack the files themselves "
        f"(tar --dereference --hard-dereference)"
    )


def scan_at(location: str, room: Path | None = None) -> tuple[Shard, np.ndarray]:
    """`scan` a shard at a path or URL; a URL is copied to a folder below `room` first."""
    with local_copy(location, room) as path:
        shard, offsets = scan(path, location)
    return replace(shard, url=location if is_url(location) else ""), offsets


def read_sample(data: Bytes) -> tuple[str, dict[str, memoryview]]:
    """The key and the files by extension in the bytes of one sample; the files are views of them.

    Raises:
        BrokenData: a header is damaged, or the bytes are not exactly one sample, as with offsets
            from a wrong index.
    """
    files: dict[str, memoryview] = {}
    key, buffer = "", memoryview(data)
    for member in walk(buffer, archive=False):
        parts = split_name(member.name)
        if parts is None:
            continue
        if files and parts[0] != key:
            raise BrokenData(f"files of {key!r} and {parts[0]!r} in one sample")
        if parts[1] in files:
            raise BrokenData(f"{member.name!r} appears twice")
        key = parts[0]
        files[parts[1]] = buffer[member.start : member.start + member.size]
    return key, files


def _samples(buffer: memoryview, links: Counter[str]) -> Iterator[tuple[int, set[str], int]]:
    """Yield the offset, extensions and end of each sample of a tar; count links."""
    key, offset, end = "", 0, 0
    extensions: set[str] = set()
    for member in walk(buffer, links=links):
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != key and extensions:
            yield offset, extensions, end
            extensions = set()
        if parts[1] in extensions:
            raise BrokenData(f"{member.name!r} at byte {member.header} appears twice")
        if not extensions:
            key, offset = parts[0], member.header
        extensions.add(parts[1])
        end = member.end
    if extensions:
        yield offset, extensions, end


class TarWriter:
    """Writer of an uncompressed USTAR file whose bytes depend on names and contents only."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.bytes = 0

    def add(self, name: str, data: bytes) -> None:
        """Append a file with a fixed mode, owner and time."""
        info = TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(USTAR_FORMAT, encoding="utf-8"))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))

    def finish(self) -> str:
        """Write the end-of-archive marker and return the xxh3-128 of the whole file."""
        self._write(ZERO_BLOCK * 2)
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)


def write_shard(
    path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], writer: str = ""
) -> Shard:
    """Write samples, each a key and its contents by extension, to a tar and its index.

    Samples may come from a generator: none is kept. `writer`: see `replacing`.

    Returns:
        The manifest's entry.
    """
    offsets = [0]
    columns: Counter[str] = Counter()
    with replacing(path, writer) as file:
        tar = TarWriter(file)
        for key, members in samples:
            columns.update(members.keys())
            for extension, data in members.items():
                tar.add(f"{key}.{extension}", data)
            offsets.append(tar.bytes)
        digest = tar.finish()
    write_index(path, np.array(offsets), writer)
    return Shard(path.name, len(offsets) - 1, tar.bytes, digest, dict(sorted(columns.items())))
