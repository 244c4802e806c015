"""Every image of a run, listed once: records on disk, some tens of bytes per image in memory.

An unfinished run keeps its catalogue, so that it resumes without listing the files again. An
image's place in the shards follows from its name alone, not from the order in which the file
system lists the files.
"""

import errno
import json
import mmap
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np
import xxhash

from taming_dist.errors import UserError
from taming_dist.formats.shards import BLOCK
from taming_dist.formats.strict_json import write_json
from taming_dist.prepare.collections.entry import HIDDEN, OTHER_FILE, Collection, Entry, LeftOut
from taming_dist.prepare.making.layers import Unfit

MAX_KEY = 80  # a USTAR name has 100 bytes, extension included
DIGEST_BITS = 128
NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
RECORDS, BYTES, LEFT_OUT, PLAN = "images.jsonl", "images.bin", "left_out.jsonl", "plan.json"
NAMES, KEYS, SIZES, STARTS, AMBIGUOUS = "names", "keys", "sizes", "starts", "ambiguous"


@dataclass(frozen=True)
class Record:
    """One image in the catalogue: an `Entry` whose bytes, if any, are a range of a file.

    `sizes`: bytes of the image and its pairs by path when they were listed.
    """

    name: str
    image: str
    start: int | None
    sizes: dict[str, int]
    cls: int | None
    pairs: dict[str, str]
    facts: dict[str, Any]


class Catalogue:
    """The images listed in a folder; `record(i)` reads one of them.

    `names`, `keys`: uint64 [n], hashes of the name and of the key derived from it.
    `sizes`: int64 [n], bytes of all files of the image and of their tar headers.
    `ambiguous`: bool [n], whether another image has the same key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names, self.keys, self.sizes, self._starts, self.ambiguous = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in (NAMES, KEYS, SIZES, STARTS, AMBIGUOUS)
        )
        plan = json.loads((folder / PLAN).read_text())
        self.settings: str = plan["settings"]
        self.digest: str = plan["digest"]

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Catalogue, (self._folder,)  # the other process maps the same files

    @cached_property
    def _records(self) -> mmap.mmap:
        with open(self._folder / RECORDS, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def record(self, index: int) -> Record:
        """Read a record; cheap, wherever it lies."""
        start = int(self._starts[index])
        return Record(**json.loads(self._records[start : self._records.find(b"\n", start)]))

    def read_image(self, record: Record) -> bytes:
        """The bytes of an image; `Unfit` if its file has changed since it was listed."""
        if record.start is None:
            return _read(record.image, record.sizes[record.image])
        return os.pread(self._contents, record.sizes[record.image], record.start)

    def read_pair(self, record: Record, column: str) -> bytes:
        """The bytes of a map that belongs to an image; `Unfit` if its file has changed since."""
        path = record.pairs[column]
        return _read(path, record.sizes[path])

    @cached_property
    def _contents(self) -> int:
        return os.open(self._folder / BYTES, os.O_RDONLY)

    def left_out(self) -> Iterator[LeftOut]:
        """The files that were left out when the images were listed."""
        with open(self._folder / LEFT_OUT) as file:
            for line in file:
                yield LeftOut(**json.loads(line))


def list_images(folder: Path, collection: Collection, settings: str) -> Catalogue:
    """Write the catalogue of `collection` to a new folder; plan.json, written last, completes it.

    Raises:
        UserError: there is no image, or one is listed twice.
    """
    forget(folder)
    folder.mkdir(parents=True)
    columns = {NAMES: array("Q"), KEYS: array("Q"), SIZES: array("q"), STARTS: array("q")}
    total, end = 0, 0
    unusable: LeftOut | None = None  # the first image that cannot be used
    with ExitStack() as stack:
        records, contents = (stack.enter_context(open(folder / n, "wb")) for n in (RECORDS, BYTES))
        left_out = stack.enter_context(open(folder / LEFT_OUT, "w"))
        for entry in collection:
            listed = _stat(entry, contents) if isinstance(entry, Entry) else entry
            if isinstance(listed, LeftOut):
                left_out.write(json.dumps(asdict(listed), allow_nan=False) + "\n")
                if listed.kind != OTHER_FILE and (unusable is None or unusable.kind == HIDDEN):
                    unusable = listed
                continue
            record, fingerprint = listed
            line = json.dumps(asdict(record), allow_nan=False).encode() + b"\n"
            records.write(line)
            row = (*hashes(record.name), _tar_bytes(record), end)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            total += fingerprint
            end += len(line)
    if not end:
        raise _nothing(collection, unusable)
    arrays = {name: np.frombuffer(column, column.typecode) for name, column in columns.items()}
    _require_distinct(folder, collection, arrays)
    arrays[AMBIGUOUS] = _repeated(arrays[KEYS])
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    plan = {"settings": settings, "digest": _digest(total, settings)}
    write_json(folder / PLAN, plan)
    return Catalogue(folder)


def forget(folder: Path) -> None:
    """Remove a catalogue, its plan first, so that a killed process leaves no valid catalogue."""
    (folder / PLAN).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _nothing(collection: Collection, first: LeftOut | None) -> UserError:
    if first is None:
        return UserError(f"{collection.where}: no jpg, png or webp file")
    return UserError(
        f"{collection.where}: none of the images can be used; the first: {first.name}: "
        f"{first.reason}"
    )


def _require_distinct(folder: Path, collection: Collection, arrays: dict[str, np.ndarray]) -> None:
    twice = np.flatnonzero(_repeated(arrays[NAMES]))
    if len(twice):
        with open(folder / RECORDS, "rb") as records:
            records.seek(int(arrays[STARTS][twice[0]]))
            name = json.loads(records.readline())["name"]
        raise UserError(f"{collection.where}: {name} is listed twice; list every image once")


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which of the values occur more than once."""
    distinct, counts = np.unique(values, return_counts=True)
    return np.isin(values, distinct[counts > 1])


def digest_of(collection: Collection, settings: str) -> str:
    """The digest that the catalogue of `collection` has."""
    total = 0
    with open(os.devnull, "wb") as contents:
        for entry in collection:
            listed = _stat(entry, contents) if isinstance(entry, Entry) else entry
            total += 0 if isinstance(listed, LeftOut) else listed[1]
    return _digest(total, settings)


def _digest(total: int, settings: str) -> str:
    # A sum is independent of the order in which the file system lists the images.
    text = f"{settings} {total % 2**DIGEST_BITS}"
    return xxhash.xxh3_128_hexdigest(text.encode())


def _read(path: str, size: int) -> bytes:
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        data = None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): fix or remove it, then run the same "
            f"command again"
        ) from error
    if data is None or len(data) != size:
        raise Unfit("changed", f"{path} was changed or removed after it was listed")
    return data


def _stat(entry: Entry, contents: BinaryIO) -> tuple[Record, int] | LeftOut:
    """The record of an entry, and a digest of it that includes sizes and times."""
    pairs = {column: str(path) for column, path in entry.pairs.items()}
    sizes: dict[str, int] = {}
    facts: list[Any] = [entry.name, entry.cls, sorted(pairs.items()), entry.facts]
    paths = list(pairs.values())
    if isinstance(entry.image, bytes):
        image, start = BYTES, contents.tell()
        contents.write(entry.image)
        sizes[image] = len(entry.image)
        facts.append(xxhash.xxh3_128_hexdigest(entry.image))
    else:
        image, start = str(entry.image), None
        paths.insert(0, image)
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            if error.errno not in NO_SUCH_FILE:
                raise
            return LeftOut(entry.name, "missing", f"{path}: {error.strerror}")
        if not S_ISREG(stat.st_mode):  # opening a pipe would block
            return LeftOut(entry.name, "missing", f"{path} is not a regular file")
        sizes[path] = stat.st_size
        facts.append([stat.st_size, stat.st_mtime_ns])
    record = Record(entry.name, image, start, sizes, entry.cls, pairs, dict(entry.facts))
    return record, xxhash.xxh3_128_intdigest(json.dumps(facts).encode())


def _tar_bytes(record: Record) -> int:
    """The bytes of an image in a tar if stored unchanged; approximate for class and facts."""
    files = [*record.sizes.values(), *([BLOCK] if record.facts else [])]
    files += [BLOCK] if record.cls is not None else []
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in files)


def hashes(name: str) -> tuple[int, int]:
    """Two 64-bit hashes: of an image's name, and of its key if no other image has the same.

    The first decides its place, the second its split.
    """
    return _hash(name), _hash(plain_key(name))


def plain_key(name: str) -> str:
    """The name without its extension, in characters that are allowed in keys."""
    return re.sub(r"[^A-Za-z0-9_/-]", "_", name.rpartition(".")[0].lstrip("/"))


def key_of(name: str, is_ambiguous: bool) -> str:
    """The key of an image: its own name where the tar format allows that."""
    key = plain_key(name)
    if len(key) <= MAX_KEY and not is_ambiguous:
        return key
    suffix = f"_{_hash(name):016x}"
    return key[-(MAX_KEY - len(suffix)) :].replace("/", "_") + suffix


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape"))
