"""The order of samples: a pure function of the seed and the position, for any number of ranks.

An epoch: the shards are permuted and concatenated to one ring, which is opened at a random
sample; C lanes of L = N // C consecutive samples are cut from it (N mod C samples, others each
epoch, are left out); each lane is cut into blocks of B samples, permuted inside; the lanes are
numbered at random. Position p of the epoch is sample p // C of lane p mod C. Rank r of R reads
the positions p with p mod R == r, so any R that divides C and the global batch sees the same
global batches.

Random numbers come from Philox (Salmon et al., SC 2011), keyed by seed and purpose and counted
by epoch and block; permutations sort its raw words, which numpy keeps stable between versions.
"""

from functools import lru_cache

import numpy as np

from taming_dist.errors import UserError

SHARDS, RING, LANES, BLOCKS, PIXELS = range(5)
PURPOSES = 64  # apart are the purposes of two data sets of a mixture


def random_words(seed: int, purpose: int, *counter: int, count: int) -> np.ndarray:
    """`count` random uint64 words that depend on nothing but the arguments."""
    high = [*counter, 0, 0, 0][:3]
    # The lowest counter word is the one that counts up while words are drawn.
    generator = np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64),
        counter=np.array([0, *high], dtype=np.uint64),
    )
    return np.atleast_1d(generator.random_raw(count))


def permutation(seed: int, purpose: int, *counter: int, count: int) -> np.ndarray:
    """A random permutation of `count` numbers, int64 [count]."""
    return np.argsort(random_words(seed, purpose, *counter, count=count), kind="stable")


def positions_of(start: int, stop: int, rank: int, world_size: int) -> np.ndarray:
    """The positions P in [start, stop) with P mod R == r, int64."""
    return np.arange(start + (rank - start) % world_size, stop, world_size, dtype=np.int64)


def check_lanes(lanes: int, world_size: int) -> None:
    """Raise `UserError` unless every rank gets the same number of lanes."""
    if lanes % world_size:
        raise UserError(
            f"data.lanes is {lanes}, which {world_size} ranks cannot share equally: "
            f"make it a multiple of {world_size}"
        )


class Order:
    """Which sample stands at which position of an endless training run.

    Args: `samples_per_shard` int64 [shards]; `seed` >= 0; `lanes` C and `block` B as above; `part`
    numbers the data sets of a mixture (`taming_dist.data.mixture`), in whose orders random numbers
    differ and blocks go on over the end of an epoch, so that they stay in step.
    Raises `UserError` naming data.lanes if there are fewer samples than lanes.
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
            raise UserError(f"run.seed is {seed} but must be in 0 .. 2^64 - 1")
        if self.num_samples < lanes:
            raise UserError(
                f"data.lanes is {lanes} but the data set has {self.num_samples} samples: "
                f"set data.lanes to at most that (a multiple of the number of ranks)"
            )
        self.length = self.num_samples // lanes * lanes
        # Consecutive positions share their epoch and blocks; two of each bridge a boundary.
        self._epoch_plan = lru_cache(maxsize=2)(self._plan_epoch)
        self._block_order = lru_cache(maxsize=4)(self._permute_blocks)

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless every rank gets the same number of lanes."""
        check_lanes(self.lanes, world_size)

    def ids(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Global sample ids at the positions P in [start, stop) with P mod R == r, int64."""
        self.check_world(world_size)
        return self.ids_at(positions_of(start, stop, rank, world_size))

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Global sample ids at any positions, int64.

        Positions are endless: epoch P // length, and within it P mod length.
        """
        epochs = self.epochs(positions)
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            ids[inside] = self._ids_of_epoch(int(epoch), positions[inside] % self.length)
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position."""
        return positions // self.length

    def window_end(self, position: int) -> int:
        """The next position where a block ends in all lanes, or the epoch."""
        place, window = position % self.length, self.lanes * self.block
        return position + min(window - place % window, self.length - place)

    def _ids_of_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        numbering, shards, ring_start, ends = self._epoch_plan(epoch)
        lane, index = numbering[positions % self.lanes], positions // self.lanes
        block = (index + self._lead(epoch)) // self.block
        for number in np.unique(block):
            here, first = block == number, self._block_span(epoch, int(number))[0]
            order = self._block_order(epoch, int(number))
            index[here] = first + order[lane[here], index[here] - first]
        ring = (ring_start + lane * (self.length // self.lanes) + index) % self.num_samples
        place = np.searchsorted(ends, ring, side="right")
        shard = shards[place]
        return self._first[shard] + ring - (ends[place] - self._counts[shard])

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Lane numbering [lanes], shard order [shards], start on the ring, ends on the ring."""
        purpose = self._purpose
        numbering = permutation(self.seed, purpose + LANES, epoch, count=self.lanes)
        shards = permutation(self.seed, purpose + SHARDS, epoch, count=len(self._counts))
        word = random_words(self.seed, purpose + RING, epoch, count=1)[0]
        start = int(word % np.uint64(self.num_samples))
        return numbering, shards, start, np.cumsum(self._counts[shards])

    def _lead(self, epoch: int) -> int:
        """How much of its first block lies in the epoch before."""
        return epoch * (self.length // self.lanes) % self.block if self._is_part else 0

    def _block_span(self, epoch: int, block: int) -> tuple[int, int]:
        """First and last index of a block within its lane."""
        start = block * self.block - self._lead(epoch)
        return max(0, start), min(start + self.block, self.length // self.lanes)

    def _permute_blocks(self, epoch: int, block: int) -> np.ndarray:
        """The inner order of one block in every lane, int64 [lanes, samples of the block]."""
        first, last = self._block_span(epoch, block)
        size = last - first
        words = random_words(
            self.seed, self._purpose + BLOCKS, epoch, block, count=self.lanes * size
        )
        return np.argsort(words.reshape(self.lanes, size), axis=1, kind="stable")


def sequential_ids(start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """The order of evaluation: every sample of [start, stop) once, rank r reads each R-th."""
    return np.arange(start + rank, stop, world_size, dtype=np.int64)
