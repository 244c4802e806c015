"""Decoding samples into the rows of a batch; the same code in every process and thread.

An unreadable sample never shifts the others: in training it is replaced by the next good sample of
its shard, in evaluation it is left out; either way it is reported. Does not import torch: the
decoding process has to start quickly.
"""

import json
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from taming_dist.data.fetching import Shards, Ticket, fetch
from taming_dist.data.images import COLUMNS, Column, Preprocess, View, in_proportion
from taming_dist.data.plan import Plan, prefetched, reading_threads
from taming_dist.data.slots import Layout, Rows
from taming_dist.errors import UserError
from taming_dist.formats.classes import class_fault, whole_number
from taming_dist.formats.encoded import Channels, Encoded
from taming_dist.formats.faults import BrokenClass, BrokenData, LostData
from taming_dist.formats.manifest import Dataset
from taming_dist.formats.objects import Boxes, objects_of
from taming_dist.formats.shards import read_sample
from taming_dist.formats.storage import Bytes

Files = dict[str, memoryview]
Extra = Mapping[str, Callable[[Files], Any]]  # by name, how it is read from a sample's files
READ_AHEAD = 2**30  # bytes of encoded samples that a rank holds at most
MAX_JSON = 2**22  # bytes of a sample's JSON
CLASS_ID = re.compile(rb"\s*[+-]?[0-9]{1,100}\s*")
READING_THREADS = 8  # they mostly wait: briefly for a disk, long for a distant store


class Scratch(threading.local):
    """A buffer per thread for the pixels of one image: being reused, it stays in the CPU cache."""

    def __init__(self) -> None:
        self.pixels = np.empty(2**22, dtype=np.uint8)  # larger images would not stay there


@dataclass
class Filled:
    """What was written to the first rows of a batch, one row for each of `keys`.

    `asked` samples were tried; `bad` has {shard, key, offset, error} of the broken ones, `damaged`
    of those whose picture is used although part of it is lost; `extra` has what else was asked for
    by name, a value for each row.
    """

    asked: int
    keys: list[str]
    bad: list[dict[str, Any]]
    extra: dict[str, list[Any]]
    damaged: list[dict[str, Any]]


class Part(NamedTuple):
    """The file of a column and the view of it that becomes a row; `method` resizes it."""

    column: str
    file: Encoded
    view: View
    method: Image.Resampling


class Sample(NamedTuple):
    """A sample that is read except for its pixels; if there is an `error`, only its key is valid.

    `crop` as in `View.crop`; `number`: its class id, 0 if none is read.
    """

    id: int
    epoch: int
    key: str
    parts: Sequence[Part] = ()
    crop: tuple[float, ...] = ()
    number: int = 0
    extra: Mapping[str, Any] = {}
    error: str | None = None


@dataclass(frozen=True)
class Decoder:
    """The mapping from samples to rows; can be pickled.

    `columns` of `images.COLUMNS` are read, in their order there; `read_class` gives the class of a
    sample from its files, or is None; an invalid class is a `UserError`. `extra`: what else is read
    of a sample's files; one without it is broken. So is one whose picture is partly lost, unless
    `use_damaged`.
    """

    dataset: Dataset
    plan: Plan
    preprocess: Preprocess
    columns: tuple[str, ...]
    read_class: Callable[[Files], int] | None
    extra: Extra = field(default_factory=dict)
    use_damaged: bool = False

    @property
    def layout(self) -> Layout:
        """The layout of a batch's rows."""
        return Layout(self.plan.micro_batch, self.preprocess.size, self.columns)

    def training(self, from_sample: int, reading: Executor) -> Iterator[list[Ticket]]:
        """Yield endless micro-batches from a position on, read ahead by the threads `reading`."""
        total = sum(shard.bytes for shard in self.dataset.shards)
        ahead = max(1, READ_AHEAD * self.dataset.num_samples // total)
        ahead = min(ahead, self.plan.round_samples)
        windows = self.plan.rounds(from_sample, ahead)
        return self._batches(fetch(windows, self._shards, reading, ahead, self.plan.block))

    def evaluation(self, start: int, stop: int | None, reading: Executor) -> Iterator[list[Ticket]]:
        """Yield each sample of [start, stop) once over all ranks; the last batch may be short."""
        size = self.plan.micro_batch
        windows = self.plan.evaluation(start, stop)
        return self._batches(fetch(windows, self._shards, reading, 2 * size, size))

    def _batches(self, tickets: Iterator[Ticket]) -> Iterator[list[Ticket]]:
        while batch := list(islice(tickets, self.plan.micro_batch)):
            yield batch

    def fill(self, tickets: Iterable[Ticket], rows: Rows, replace: bool) -> Filled:
        """Decode samples into rows; `replace` broken ones by the next good one of their shard."""
        # Decoding evicts Python's code from the CPU caches, which makes it three times as slow. So
        # all samples are opened before the first is decoded, and noted after the last.
        samples = [self._open_at(t.id, t.epoch, t.take(self._shards)) for t in tickets]
        good: list[Sample] = []
        filled = Filled(len(samples), [], [], {}, [])
        for sample in samples:
            try:
                lost = self.decode(sample, rows, len(good))
            except BrokenData as error:
                filled.bad.append(self._record(sample, error))
                if replace:
                    good.append(self._replace(sample, rows, len(good), filled))
            else:
                good.append(sample)
                self._note_losses(sample, lost, filled)
        note(good, rows)
        filled.keys = [sample.key for sample in good]
        filled.extra = {name: [sample.extra[name] for sample in good] for name in self.extra}
        return filled

    def open(self, id: int, epoch: int, data: Bytes) -> Sample:
        """Read all of a sample except its pixels; raises `BrokenClass`."""
        key = ""
        try:
            key, files = read_sample(data)
            columns = [COLUMNS[name] for name in self.columns]
            found = [column.open(_need(files, *column.files)) for column in columns]
            whole = found[0].size
            view = self.preprocess.view(*whole, self.preprocess.words(self.plan.seed, epoch, id))
            parts = [
                Part(name, file, view.on(*_share(file.size, whole, column)), column.method)
                for name, file, column in zip(self.columns, found, columns, strict=True)
            ]
            extra = {name: read(files) for name, read in self.extra.items()}
        except BrokenData as error:
            return Sample(id, epoch, key, error=str(error))
        number = 0 if self.read_class is None else _class_id(self.read_class, key, files)
        return Sample(id, epoch, key, parts, view.crop(*whole), number, extra)

    def _open_at(self, id: int, epoch: int, data: Bytes) -> Sample:
        """`open`, with an invalid class as a `UserError` that names the sample."""
        try:
            return self.open(id, epoch, data)
        except BrokenClass as error:
            shard = self._shards.location(self._shards.locate_one(id)[0])
            raise UserError(f"{shard}: {error}") from error

    def decode(self, sample: Sample, rows: Rows, row: int) -> LostData | None:
        """Decode the pixels of a sample into a row.

        Returns:
            What is lost of its picture, if damaged pictures are used.

        Raises:
            BrokenData: it is broken.
        """
        if sample.error is not None:
            raise BrokenData(sample.error)
        lost = None
        buffer = self._scratch.pixels
        for column, file, view, method in sample.parts:
            channels: Channels = "BGR" if view.flipped else "RGB"
            try:
                pixels = file.pixels(channels, buffer)
            except LostData as error:
                if not self.use_damaged:
                    raise
                lost, pixels = error, file.rest(channels)
            view.cut(pixels, rows.columns[column][row], method)
        return lost

    def _replace(self, sample: Sample, rows: Rows, row: int, filled: Filled) -> Sample:
        """Decode the next good sample of the shard in place of a broken one."""
        shard, index = self._shards.locate_one(sample.id)
        count = self.dataset.shards[shard].samples
        for step in range(1, count):
            place = (index + step) % count
            data = self._shards.read(shard, place, 1)[0]
            other = self._open_at(sample.id - index + place, sample.epoch, data)
            try:
                lost = self.decode(other, rows, row)
            except BrokenData as error:
                filled.bad.append(self._record(other, error))
            else:
                self._note_losses(other, lost, filled)
                return other
        raise UserError(f"no sample of {self._shards.location(shard)} can be read")

    def _note_losses(self, sample: Sample, lost: LostData | None, filled: Filled) -> None:
        if lost is not None:
            filled.damaged.append(self._record(sample, lost))

    def _record(self, sample: Sample, error: BrokenData) -> dict[str, Any]:
        """The record of a bad sample."""
        shard, index = self._shards.locate_one(sample.id)
        location, offset = self._shards.location(shard), self._shards.offset(shard, index)
        return {"shard": location, "key": sample.key, "offset": offset, "error": str(error)}

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.dataset)

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def note(samples: Sequence[Sample], rows: Rows) -> None:
    """Store the ids, classes and crops of the samples in the first rows, beside their pixels."""
    count = len(samples)
    rows.ids[:count] = [sample.id for sample in samples]
    rows.classes[:count] = [sample.number for sample in samples]
    rows.crops[:count] = np.reshape([sample.crop for sample in samples], (count, 5))


def decode_in_threads(
    decoder: Decoder, start: int, stop: int | None, threads: int
) -> Generator[tuple[Filled, Rows], None, None]:
    """Yield the batches of an evaluation in order, decoded by threads of this process.

    Closing or dropping the iterator ends the threads; their exceptions are raised here.
    """

    def fill(tickets: list[Ticket]) -> tuple[Filled, Rows]:
        rows = decoder.layout.rows(memoryview(bytearray(decoder.layout.bytes)))
        return decoder.fill(tickets, rows, replace=False), rows

    with reading_threads(READING_THREADS) as reading:
        batches = decoder.evaluation(start, stop, reading)
        with closing(prefetched(fill, batches, threads, ahead=threads + 1)) as decoded:
            yield from decoded


def choose_class_column(dataset: Dataset) -> Callable[[Files], int] | None:
    """Choose how classes are read: either all samples have one, or none is read."""
    columns, everyone = dataset.columns, dataset.num_samples
    if not dataset.classes_agree:
        return None
    if columns.get("cls", 0) == everyone:
        return _read_cls
    if columns.get("json", 0) == everyone:
        shards = Shards(dataset)
        try:
            return _class_in_json(read_sample(shards.read(0, 0, 1)[0])[1])
        except BrokenData as error:
            first = shards.location(0)
            raise UserError(f"the first sample of {first} is damaged: {error}") from error
    return None


def read_objects(files: Files) -> Boxes:
    """The objects of a sample as fractions of its image; `BrokenData` if it has no valid list."""
    return objects_of(_parse_json(_need(files, "json")))


def check_objects(dataset: Dataset, reader: str = "--boxes") -> None:
    """Raise `UserError` unless all samples have JSON files, and the first one has objects; `reader`
    is what needs them."""
    count, everyone, shards = dataset.columns.get("json", 0), dataset.num_samples, Shards(dataset)
    first = shards.location(0)
    if count < everyone:
        raise UserError(
            f"{reader} needs the objects of every image, but {count} of {everyone} samples of "
            f"{first} and its like have a .json: make the shards with --layout coco or openimages"
        )
    try:
        read_objects(read_sample(shards.read(0, 0, 1)[0])[1])
    except BrokenData as error:
        raise UserError(
            f"{reader} needs the objects of every image, but {error} (the first sample of "
            f"{first}): make the shards with --layout coco or openimages"
        ) from error


def class_of(files: Files) -> Callable[[Files], int] | None:
    """How to read the class of a sample like this one; None if it has none."""
    if "cls" in files:
        return _read_cls
    return _class_in_json(files) if "json" in files else None


def _class_in_json(files: Files) -> Callable[[Files], int] | None:
    record = _parse_json(_need(files, "json"))
    for name in ("cls", "label"):
        if isinstance(record.get(name), int | float):
            return partial(_read_json, name=name)
    return None


def _class_id(read_class: Callable[[Files], int], key: str, files: Files) -> int:
    """The class of a sample; raises `BrokenClass` naming the sample and the fix."""
    try:
        number = read_class(files)
        fault = class_fault(number)
        if fault is not None:
            raise BrokenData(fault)
    except BrokenData as error:
        raise BrokenClass(
            f"the class of the sample {key} is invalid: {error}; make the shards with class "
            f"ids, or omit classes (tools/tokenize_dataset.py --no-classes)"
        ) from error
    return number


def _need(files: Files, *extensions: str) -> memoryview:
    """The first of these files that exists."""
    for extension in extensions:
        if extension in files:
            return files[extension]
    wanted, there = " or ".join(f".{name}" for name in extensions), ", ".join(sorted(files))
    raise BrokenData(f"no {wanted} among {there or 'its files'}")


def _share(size: tuple[int, int], whole: tuple[int, int], column: Column) -> tuple[float, float]:
    """Height and width of pixels relative to those of the first column; `BrokenData` if they do
    not match."""
    if size != whole and not (column.may_be_smaller and in_proportion(size, whole)):
        raise BrokenData(f"a .{column.files[0]} of {size} on an image of {whole}")
    return size[0] / whole[0], size[1] / whole[1]


def _read_cls(files: Files) -> int:
    data = _need(files, "cls")
    if CLASS_ID.fullmatch(data) is None:
        raise BrokenData(f"its .cls is {bytes(data[:20])!r}, which is not a whole number")
    return int(data)


def _read_json(files: Files, name: str) -> int:
    value = _parse_json(_need(files, "json")).get(name)
    number = whole_number(value) if isinstance(value, int | float) else None
    if number is None:
        raise BrokenData(f"its json has no integer {name!r}")
    return number


def _parse_json(data: memoryview) -> dict[str, Any]:
    if len(data) > MAX_JSON:
        raise BrokenData(f"its json has {len(data)} bytes, more than {MAX_JSON}")
    try:
        record = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise BrokenData(f"its json is damaged ({error})") from error
    return record if isinstance(record, dict) else {}
