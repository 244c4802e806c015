"""Images from shards that cannot be indexed: pipes, and web servers without byte ranges.

The guarantees are weaker than those of `Reader`. Every rank gets as many batches as it requests, by
a plan that depends on the seed, and all shards are read equally often. But the samples of a global
batch depend on the number of ranks, and a resumed run continues at another place of the plan. Each
shard is copied to a temporary file before any of its samples is used: a failed copy is restarted,
so no sample comes twice, and a truncated tar is an error rather than an early end. The pipeline and
its shuffle buffer are webdataset's.
"""

import glob
import hashlib
import itertools
import json
import logging
import random
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from taming_dist.data.decoding import Decoder, class_of, note
from taming_dist.data.order import permutation, random_words
from taming_dist.data.plan import Plan, reading_threads
from taming_dist.data.reader import Batch, Batching, Reading, in_order
from taming_dist.data.slots import Rows
from taming_dist.errors import UserError
from taming_dist.formats import storage
from taming_dist.formats.faults import USE, BrokenClass, BrokenData
from taming_dist.formats.manifest import Dataset, specs_of
from taming_dist.formats.shards import map_file, read_sample, scan

SHUFFLED = 1000  # samples in the shuffle buffer of a rank
STREAM, BUFFER = 32, 33  # purposes of random numbers, distinct from those of `order`


def stream_locations(spec: Any, allow_pipe: bool) -> tuple[str, ...]:
    """The shards that a spec names, without a manifest: paths, globs, URLs and `pipe:` commands.

    Raises:
        UserError: a pipe, that is, a shell command, unless it is allowed.
    """
    if isinstance(spec, Mapping):
        raise UserError("data.streaming=true cannot read a mixture: give a shard spec or a list")
    found: list[str] = []
    for single in filter(str.strip, specs_of(spec)):
        if single.startswith("pipe:") and not allow_pipe:
            raise UserError(f"{single!r} is a shell command: allow it with data.allow_pipe=true")
        if not single.startswith("pipe:"):
            storage.check_scheme(single)
        for location in braceexpand(single):
            is_pattern = not storage.is_url(location) and glob.has_magic(location)
            found += sorted(glob.glob(location)) if is_pattern else [location]
    if not found:
        raise UserError(f"the shard spec {spec!r} names no shards")
    for location in found:
        if not storage.is_url(location) and not Path(location).is_file():
            raise UserError(f"there is no shard {location}: data.streaming=true needs tar files")
    return tuple(found)


@dataclass(frozen=True)
class StreamPlan:
    """The endless sequence of shards that a rank reads."""

    locations: tuple[str, ...]
    seed: int
    rank: int
    world_size: int
    micro_batch: int

    @property
    def fingerprint(self) -> str:
        """The sha256 of the names of the shards; their contents are unknown."""
        return hashlib.sha256(json.dumps(self.locations).encode()).hexdigest()

    def shards(self, from_sample: int) -> Iterator[str]:
        """Yield every R-th of the shards, which are permuted again for each pass over them."""
        count = len(self.locations)
        for number in itertools.count(self.rank, self.world_size):
            order = permutation(self.seed, STREAM, from_sample, number // count, count=count)
            yield self.locations[order[number % count]]

    def check_start(self, from_sample: int) -> None:
        """Accept any position."""

    def state(self, samples: int) -> dict[str, Any]:
        """The state in a checkpoint: enough to continue at another place of the plan."""
        return {"samples": samples, "seed": self.seed, "streamed": self.fingerprint}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise `UserError` if `state` belongs to a run on other shards, or on indexed ones."""
        if state.get("streamed") != self.fingerprint:
            raise UserError(
                "data.train names other shards than when the run was started, or data.streaming "
                "was changed: set it back, or start a new run with another run.name"
            )


@dataclass(frozen=True)
class _Sample:
    number: int
    location: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class _Decoded:
    key: str
    rows: Rows | None
    bad: Sequence[dict[str, Any]] = ()
    damaged: Sequence[dict[str, Any]] = ()


class StreamingReader(Batching):
    """A rank's batches from shards that are read sequentially; the training side of `Reader`."""

    def __init__(self, locations: tuple[str, ...], reading: Reading) -> None:
        super().__init__(reading)
        rank, world_size = reading.rank, reading.world_size
        self.plan = StreamPlan(locations, reading.seed, rank, world_size, reading.micro_batch)
        if rank == 0:
            logging.getLogger(__name__).warning(
                "data.streaming=true: batches depend on the number of ranks, and a resumed run "
                "continues elsewhere in the data; only shards with an index are read exactly"
            )

    def batches(self, from_sample: int = 0) -> Iterator[Batch]:
        """Yield endless batches; another `from_sample` starts at another place of the plan."""
        import webdataset as wds  # not at every start: few runs stream

        word = random_words(self.plan.seed, BUFFER, from_sample, self.plan.rank, count=1)[0]
        mixed = wds.shuffle(SHUFFLED, rng=random.Random(int(word)))
        with reading_threads(self.reading.threads) as pool:
            samples = iter(wds.DataPipeline(lambda: self._samples(from_sample), mixed))
            first = next(samples)
            decoder = self._decoder(first)
            decoded = self._decode_ahead(itertools.chain([first], samples), decoder, pool)
            while True:
                good = list(itertools.islice(decoded, self.plan.micro_batch))
                rows = stack([sample.rows for sample in good if sample.rows is not None])
                has_classes = decoder.read_class is not None
                yield self.batch([sample.key for sample in good], rows, has_classes)

    def _samples(self, from_sample: int) -> Iterator[_Sample]:
        numbers = itertools.count(from_sample + self.plan.rank, self.plan.world_size)
        for location, path in copies(self.plan.shards(from_sample)):
            offsets, buffer = scan(path, location)[1].tolist(), map_file(path)
            for start, end in itertools.pairwise(offsets):
                yield _Sample(next(numbers), location, start, bytes(buffer[start:end]))

    def _decoder(self, first: _Sample) -> Decoder:
        """A decoder of single samples; classes are read only if the first sample has one."""
        reading = self.reading
        try:
            read_class = class_of(read_sample(first.data)[1]) if reading.with_classes else None
        except BrokenData as error:
            place = storage.shown(first.location)
            raise UserError(f"a sample of {place} is damaged: {error}") from error
        plan = Plan(np.empty(0, dtype=np.int64), "", self.plan.seed, 1, 1, 0, 1, 1)
        dataset = Dataset(locations=(), shards=(), indexes=())
        return Decoder(
            dataset,
            plan,
            reading.preprocess,
            in_order(reading.columns),
            read_class,
            use_damaged=reading.damaged == USE,
        )

    def _decode_ahead(
        self, samples: Iterator[_Sample], decoder: Decoder, pool: ThreadPoolExecutor
    ) -> Iterator[_Decoded]:
        """Decode samples in order; a broken one is replaced by the next."""
        pending: deque[Future[_Decoded]] = deque()
        for sample in samples:
            pending.append(pool.submit(decode_one, decoder, sample))
            if len(pending) > 2 * self.plan.micro_batch:
                decoded = pending.popleft().result()
                self.count(1, decoded.bad, decoded.damaged)
                if decoded.rows is not None:
                    yield decoded


def decode_one(decoder: Decoder, sample: _Sample) -> _Decoded:
    """Decode the image, maps and class of one sample, or find what is wrong with it."""
    try:
        opened = decoder.open(sample.number, 0, sample.data)
    except BrokenClass as error:
        raise UserError(f"{storage.shown(sample.location)}: {error}") from error
    layout, key = decoder.layout, opened.key
    rows = layout.rows(memoryview(bytearray(layout.bytes)))
    place = {"shard": storage.shown(sample.location), "key": key, "offset": sample.offset}
    try:
        lost = decoder.decode(opened, rows, 0)
    except BrokenData as error:
        return _Decoded(key, None, bad=[place | {"error": str(error)}])
    note([opened], rows)
    damaged = [] if lost is None else [place | {"error": str(lost)}]
    return _Decoded(key, rows, damaged=damaged)


def copies(locations: Iterator[str]) -> Iterator[tuple[str, Path]]:
    """Yield each shard as a local file, copying one ahead; a copy is removed after use."""
    with (
        tempfile.TemporaryDirectory(prefix="shards.", suffix=".tmp") as room,
        reading_threads(1) as copier,
    ):

        def copy(number: int, location: str) -> tuple[str, Path]:
            if not storage.is_url(location):
                return location, Path(location)
            path = Path(room) / f"{number}.tar"
            storage.copy_in_sequence(location, path)
            return location, path

        numbered = enumerate(locations)
        coming = copier.submit(copy, *next(numbered))
        for number, location in numbered:
            now, path = coming.result()
            coming = copier.submit(copy, number, location)
            yield now, path
            if storage.is_url(now):
                path.unlink()


def stack(parts: list[Rows]) -> Rows:
    """Stack the rows of single samples into those of a batch."""
    return Rows(
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.crops for part in parts]),
    )
