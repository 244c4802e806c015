"""The order of samples: a pure function of the seed and the position, for any number of ranks.

An epoch: the shards are permuted and concatenated into a ring, which is opened at a random
sample; C lanes of L = N // C consecutive samples are cut from it (N mod C samples, different ones
each epoch, are left out); each lane is cut into blocks of B samples, which are permuted inside;
the lanes are numbered at random. Position p of the epoch is sample p // C of lane p mod C. Rank r
of R reads the positions p with p mod R == r, so any R that divides C and the global batch sees the
same global batches.

Random numbers come from Philox (Salmon et al., SC 2011), keyed by seed and purpose and counted
by epoch and block; permutations sort its raw words, which numpy keeps stable between versions.
"""

import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from taming_dist.data.batching import check_shared
from taming_dist.errors import UserError

SHARDS, RING, LANES, BLOCKS, PIXELS = range(5)
PURPOSES = 64  # the distance between the purposes of two data sets of a mixture


class _Generator(threading.local):
    """One Philox per thread: setting its state takes less than half as long as making one."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state = self.philox.state  # before any word is drawn


_GENERATOR = _Generator()


def random_words(seed: int, purpose: int, *counter: int, count: int) -> np.ndarray:
    """`count` random uint64 words that depend on the arguments only."""
    generator, state = _GENERATOR.philox, _GENERATOR.state
    # The lowest counter word counts up while words are drawn.
    state["state"]["counter"][:] = [0, *counter, 0, 0, 0][:4]
    state["state"]["key"][:] = seed, purpose
    generator.state = state
    return np.atleast_1d(generator.random_raw(count))


def permutation(seed: int, purpose: int, *counter: int, count: int) -> np.ndarray:
    """A random permutation of `count` numbers, int64 [count]."""
    return np.argsort(random_words(seed, purpose, *counter, count=count), kind="stable")


def positions_of(start: int, stop: int, rank: int, world_size: int) -> np.ndarray:
    """The positions P in [start, stop) with P mod R == r, int64."""
    return np.arange(start + (rank - start) % world_size, stop, world_size, dtype=np.int64)


class Order:
    """The order of samples in an endless training run.

    `samples_per_shard` int64 [shards]; `seed` >= 0; `lanes` C and `block` B as above; `part` is the
    number of a data set in a mixture (`taming_dist.data.mixture`): the orders of a mixture have
    different random numbers, and blocks that continue across the end of an epoch, so that they stay
    in step.

    Raises:
        UserError: there are fewer samples than lanes; names data.lanes.
    """

    def __init__(
        self,
        samples_per_shard: np.ndarray,
        seed: int,
        lanes: int,
        block: int,
        part: int | None = None,
    ) -> None:
        self._purpose = 0 if part is None else PURPOSES * (part + 1)
        self._is_part = part is not None
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self.num_samples = int(self._counts.sum())
        self.seed, self.lanes, self.block = seed, lanes, block
        for key, value in (("data.lanes", lanes), ("data.block", block)):
            if value < 1:
                raise UserError(f"{key} is {value} but must be at least 1")
        if not 0 <= seed < 2**64:
            raise UserError(f"run.seed is {seed} but must be between 0 and 2^64 - 1")
        if self.num_samples < lanes:
            raise UserError(
                f"data.lanes is {lanes} but the data set has {self.num_samples} samples: "
                f"set data.lanes to at most that (a multiple of the number of ranks)"
            )
        self.length = self.num_samples // lanes * lanes
        # Consecutive positions share their epoch and blocks; keeping two of each covers a boundary.
        self._epoch_plan = lru_cache(maxsize=2)(self._plan_epoch)
        self._block_ids = lru_cache(maxsize=4)(self._order_blocks)

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless every rank gets the same number of lanes."""
        check_shared("data.lanes", self.lanes, world_size)

    def ids(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Global sample ids at the positions P in [start, stop) with P mod R == r, int64."""
        self.check_world(world_size)
        return self.ids_at(positions_of(start, stop, rank, world_size))

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Global sample ids at arbitrary positions, int64.

        Positions are endless: P is position P mod length of epoch P // length.
        """
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch, inside in _groups(self.epochs(positions)):
            ids[inside] = self._ids_of_epoch(epoch, positions[inside] - epoch * self.length)
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position."""
        return positions // self.length

    def window_end(self, position: int) -> int:
        """The next position at which a block ends in all lanes, or the epoch ends."""
        place, window = position % self.length, self.lanes * self.block
        return position + min(window - place % window, self.length - place)

    def _ids_of_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        ids = np.empty(len(positions), dtype=np.int64)
        blocks = (positions // self.lanes + self._lead(epoch)) // self.block
        for block, here in _groups(blocks):
            first = self._block_span(epoch, block)[0] * self.lanes
            ids[here] = self._block_ids(epoch, block)[positions[here] - first]
        return ids

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Lane numbering [lanes]; start on the ring; ends of the shards on the ring [shards]; the
        offset from a place on the ring to its id within each shard [shards]."""
        purpose = self._purpose
        numbering = permutation(self.seed, purpose + LANES, epoch, count=self.lanes)
        shards = permutation(self.seed, purpose + SHARDS, epoch, count=len(self._counts))
        word = random_words(self.seed, purpose + RING, epoch, count=1)[0]
        start = int(word % np.uint64(self.num_samples))
        ends = np.cumsum(self._counts[shards])
        return numbering, start, ends, self._first[shards] - (ends - self._counts[shards])

    def _lead(self, epoch: int) -> int:
        """How much of its first block lies in the previous epoch."""
        return epoch * (self.length // self.lanes) % self.block if self._is_part else 0

    def _block_span(self, epoch: int, block: int) -> tuple[int, int]:
        """First and last index of a block within its lane."""
        start = block * self.block - self._lead(epoch)
        return max(0, start), min(start + self.block, self.length // self.lanes)

    def _order_blocks(self, epoch: int, block: int) -> np.ndarray:
        """The ids of one block of every lane in the order of positions, int64 [lanes x samples]."""
        numbering, start, ends, to_id = self._epoch_plan(epoch)
        first, last = self._block_span(epoch, block)
        shape = self.lanes, last - first
        words = random_words(
            self.seed, self._purpose + BLOCKS, epoch, block, count=shape[0] * shape[1]
        )
        order = np.argsort(words.reshape(shape)[numbering], axis=1, kind="stable")
        lane = numbering[:, None] * (self.length // self.lanes)
        ring = (start + first + lane + order).T.ravel() % self.num_samples
        return ring + to_id[np.searchsorted(ends, ring, side="right")]


def _groups(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Yield each label and its indices; nearly always there is only one."""
    if len(labels) and labels.min() == labels.max():
        yield int(labels[0]), slice(None)
        return
    for label in np.unique(labels):
        yield int(label), labels == label


def sequential_ids(
    start: int, stop: int, rank: int = 0, world_size: int = 1, most: int = 0
) -> np.ndarray:
    """The order of evaluation: every sample of [start, stop) once; rank r reads every R-th.

    If there are more than `most` (0: no limit), only that many, evenly spread, the same ones on any
    number of ranks.
    """
    samples = stop - start
    count = min(samples, most) if most else samples
    places = np.arange(rank, count, world_size, dtype=np.int64)
    return start + places * samples // max(1, count)
