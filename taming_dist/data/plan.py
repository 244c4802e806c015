"""What all readers share: the samples of each batch, the reader's state, and reading ahead.

The state of a run is one number, the samples consumed; the rest verifies that this number still
means the same. The training loop counts it, so reading ahead does not.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from taming_dist.data.mixture import MixtureOrder, order_of
from taming_dist.data.order import Order, positions_of, sequential_ids
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Part

Request = TypeVar("Request")
Loaded = TypeVar("Loaded")

STATE_KEYS = {
    "seed": "run.seed",
    "lanes": "data.lanes",
    "block": "data.block",
    "fingerprint": "data.train (the fingerprint of its shards)",
    "encoders": "data.vqgan or data.condition_vqgan (the fingerprints of what encodes the images)",
}


@dataclass(frozen=True)
class Selection:
    """The samples of one batch, int64 [b]: their ids and the epoch of each."""

    ids: np.ndarray
    epochs: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The division of the order of samples into this rank's micro-batches.

    `most_evaluated`: evaluation reads at most this many samples (0: all), evenly spread.
    `encoders`: the fingerprints of the networks that encode the samples as they are read.
    """

    samples_per_shard: np.ndarray
    fingerprint: str
    seed: int
    lanes: int
    block: int
    rank: int
    world_size: int
    micro_batch: int
    parts: tuple[Part, ...] = ()
    most_evaluated: int = 0
    encoders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise UserError(f"data.micro_batch is {self.micro_batch} but must be at least 1")

    @cached_property
    def order(self) -> Order | MixtureOrder:
        """The order of training; `UserError` if the lanes fit neither the samples nor the ranks."""
        order = order_of(self.samples_per_shard, self.parts, self.seed, self.lanes, self.block)
        order.check_world(self.world_size)
        return order

    @property
    def num_samples(self) -> int:
        """The number of samples of the data set."""
        return int(self.samples_per_shard.sum())

    @property
    def num_evaluated(self) -> int:
        """The number of samples that evaluation reads, over all ranks."""
        return min(self.num_samples, self.most_evaluated or self.num_samples)

    def training(self, from_sample: int) -> Iterator[Selection]:
        """Yield endless micro-batches, from the global position `from_sample` on."""
        self.check_start(from_sample)
        start, step = from_sample, self.micro_batch * self.world_size
        while True:
            yield self._select(start, start + step)
            start += step

    @property
    def round_samples(self) -> int:
        """The number of samples in one block of each lane that this rank reads."""
        return self.lanes * self.block // self.world_size

    def rounds(self, from_sample: int, longest: int) -> Iterator[Selection]:
        """Yield the same samples in the same order as `training`, cut where the blocks of all lanes
        end and into at most `longest` samples: the units that are read together."""
        order, start = self.check_start(from_sample), from_sample
        while True:
            stop = min(order.window_end(start), start + longest * self.world_size)
            yield self._select(start, stop)
            start = stop

    def check_start(self, from_sample: int) -> Order | MixtureOrder:
        """The order; `UserError` if the ranks would be at different places of their lanes."""
        if from_sample % self.world_size:
            raise UserError(
                f"{from_sample} samples were consumed, which is not a multiple of the number of "
                f"ranks, {self.world_size}: data.global_batch must be a multiple of it"
            )
        return self.order

    def _select(self, start: int, stop: int) -> Selection:
        positions = positions_of(start, stop, self.rank, self.world_size)
        ids = self.order.ids(start, stop, self.rank, self.world_size)
        return Selection(ids, self.order.epochs(positions))

    def evaluation(self, start: int = 0, stop: int | None = None) -> Iterator[Selection]:
        """Yield every sample of [start, stop) once over all ranks, or `most_evaluated` of them; the
        last micro-batch may be short."""
        last = self.num_samples if stop is None else stop
        ids = sequential_ids(start, last, self.rank, self.world_size, self.most_evaluated)
        for first in range(0, len(ids), self.micro_batch):
            chosen = ids[first : first + self.micro_batch]
            yield Selection(chosen, np.zeros_like(chosen))

    def state(self, samples: int) -> dict[str, Any]:
        """The reader's state after `samples` consumed samples, the same on every rank."""
        state = {
            "samples": samples,
            "seed": self.seed,
            "lanes": self.lanes,
            "block": self.block,
            "fingerprint": self.fingerprint,
        }
        return state | {"encoders": list(self.encoders)} if self.encoders else state

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise `UserError` naming the key if `state` belongs to another order or other data."""
        mine = self.state(0)
        for field, key in STATE_KEYS.items():
            if state.get(field) != mine.get(field):
                raise UserError(
                    f"{key} is {mine.get(field)} but the run was started with {state.get(field)}: "
                    f"set it back, or start a new run with another run.name"
                )

    def __getstate__(self) -> dict[str, Any]:
        # Pickled without the order, which the other process makes itself.
        return {field.name: getattr(self, field.name) for field in fields(self)}


def prefetched(
    load: Callable[[Request], Loaded], requests: Iterable[Request], threads: int, ahead: int
) -> Generator[Loaded, None, None]:
    """Yield `load(request)` in order, with `threads` threads working `ahead` requests ahead.

    An exception in a thread is raised here. Closing or dropping the iterator ends the threads.
    """
    pending: deque[Future[Loaded]] = deque()
    with reading_threads(threads) as pool:
        for request in requests:
            pending.append(pool.submit(load, request))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def reading_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are waited for at the end, but not after an error, such as a wait for them that
    was broken off: they may wait for a store that hangs."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="reader")
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=isinstance(error, GeneratorExit), cancel_futures=True)
        raise
    pool.shutdown(wait=True, cancel_futures=True)
