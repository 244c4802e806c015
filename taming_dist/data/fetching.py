"""Reading the bytes of samples ahead; neighbours in a shard come in one range read.

The samples of a training run are taken lane by lane, but every lane goes through its shard block
by block. So the sorted ids of a whole round of blocks form one run of neighbours per block: each
run is read once, in the order of first use, and its samples are kept until they are taken. As many
samples are read as are taken, so memory is bounded and reading is even.
"""

import logging
import resource
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from taming_dist.data.plan import Selection
from taming_dist.formats.manifest import Dataset
from taming_dist.formats.storage import Bytes, Source, shown

logger = logging.getLogger(__name__)

SLOW_S = 30.0  # after so long a read is told of; stores whose reads have time limits end them later
OPEN_SHARDS = 512  # enough for all lanes of a rank to keep their shards open


def most_open_shards() -> int:
    """The number of shards that a reader keeps open: the two readers of a run leave a third of the
    process's file limit (ulimit -n) for everything else."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(OPEN_SHARDS, limit // 3))


class Shards:
    """The shards of a data set, opened when first read. Thread-safe."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._ends = np.cumsum(dataset.samples_per_shard)
        self._open = lru_cache(maxsize=most_open_shards())(self._open_shard)

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shards of global sample ids, and their places in them."""
        shards = np.searchsorted(self._ends, ids, side="right")
        return shards, ids - self._ends[shards] + self.dataset.samples_per_shard[shards]

    def locate_one(self, id: int) -> tuple[int, int]:
        """`locate` a single sample."""
        shard, place = self.locate(np.array([id]))
        return int(shard[0]), int(place[0])

    def location(self, shard: int) -> str:
        """Path or URL of a shard, fit to be shown."""
        return shown(self.dataset.locations[shard])

    def offset(self, shard: int, index: int) -> int:
        """The byte offset of a sample in its shard."""
        return int(self._open(shard)[1][index])

    def read(self, shard: int, first: int, count: int) -> list[Bytes]:
        """Read the bytes of `count` neighbouring samples at once; `UserError` if they are gone."""
        source, offsets = self._open(shard)
        bounds = offsets[first : first + count + 1]
        # A copy of each, so that its memory is freed once it is taken.
        return list(source.read_parts(int(bounds[0]), np.diff(bounds).tolist()))

    def _open_shard(self, shard: int) -> tuple[Source, np.ndarray]:
        return self.dataset.open_shard(shard), self.dataset.read_index(shard)


class Run:
    """Neighbouring samples of one shard that are read at once."""

    def __init__(self, shard: int, first: int, count: int) -> None:
        self.shard, self.first, self.count = shard, first, count
        self.read: Future[list[Bytes]] | None = None
        self._told = False

    def result(self, shards: Shards) -> list[Bytes]:
        """Wait for its samples, and say so if that takes long; raises what reading raised."""
        assert self.read is not None
        if not self.read.done() and not self._told and not wait([self.read], SLOW_S).done:
            self._told = True
            where = shards.location(self.shard)
            logger.warning("no answer from %s for %.0f s: still waiting", where, SLOW_S)
        return self.read.result()


class Ticket(NamedTuple):
    """One sample of the order, whose bytes are read, being read, or about to be."""

    id: int
    epoch: int
    run: Run
    place: int

    def take(self, shards: Shards) -> Bytes:
        """Take the bytes of the sample, once, waiting for them; raises what reading raised."""
        samples = self.run.result(shards)
        data = samples[self.place]
        samples[self.place] = b""
        return data


def fetch(
    windows: Iterable[Selection], shards: Shards, pool: Executor, ahead: int, longest: int
) -> Iterator[Ticket]:
    """Yield a ticket for every sample of the windows; `pool` reads up to `ahead` samples early.

    No window may have more than `ahead` samples: then everything held belongs to earlier windows or
    to the next ticket, and reading never waits for itself. `longest`: most samples per read.
    """
    remaining = iter(windows)
    planned: deque[list[Ticket]] = deque()
    unread: deque[Run] = deque()
    held = 0
    while True:
        while len(planned) < 2 and (window := next(remaining, None)) is not None:
            tickets, runs = plan_runs(window, shards, longest)
            planned.append(tickets)
            unread.extend(runs)
        if not planned:
            return
        for ticket in planned.popleft():
            while unread and held + unread[0].count <= ahead:
                run = unread.popleft()
                run.read = pool.submit(shards.read, run.shard, run.first, run.count)
                held += run.count
            yield ticket
            held -= 1


def plan_runs(window: Selection, shards: Shards, longest: int) -> tuple[list[Ticket], list[Run]]:
    """The tickets of a window in its order, and the reads that serve them in order of use."""
    order = np.argsort(window.ids, kind="stable")
    ids = window.ids[order]
    of_shard, index = shards.locate(ids)
    breaks = np.flatnonzero((np.diff(ids) != 1) | (np.diff(of_shard) != 0)) + 1
    tickets: list[Ticket | None] = [None] * len(ids)
    needed: list[tuple[int, Run]] = []
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ids)], strict=True):
        for first in range(start, stop, longest):
            last = min(first + longest, stop)
            run = Run(int(of_shard[first]), int(index[first]), last - first)
            wanted_by = order[first:last].tolist()
            needed.append((min(wanted_by), run))
            for place, number in enumerate(wanted_by):
                id, epoch = int(window.ids[number]), int(window.epochs[number])
                tickets[number] = Ticket(id, epoch, run, place)
    needed.sort(key=lambda pair: pair[0])
    return [ticket for ticket in tickets if ticket is not None], [run for _, run in needed]
