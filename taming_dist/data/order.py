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


class Order:
    """Which sample stands at which position of an endless training run.

    Args: `samples_per_shard` int64 [shards]; `seed` >= 0; `lanes` C and `block` B as above.
    Raises `UserError` naming data.lanes if there are fewer samples than lanes.
    """

    def __init__(self, samples_per_shard: np.ndarray, seed: int, lanes: int, block: int) -> None:
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
        if self.lanes % world_size:
            raise UserError(
                f"data.lanes is {self.lanes}, which {world_size} ranks cannot share equally: "
                f"make it a multiple of {world_size}"
            )

    def ids(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Global sample ids at the positions P in [start, stop) with P mod R == r, int64.

        Positions are endless: epoch P // length, and within it P mod length.
        """
        self.check_world(world_size)
        positions = self.positions(start, stop, rank, world_size)
        epochs = self.epochs(positions)
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            ids[inside] = self._ids_of_epoch(int(epoch), positions[inside] % self.length)
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position."""
        return positions // self.length

    @staticmethod
    def positions(start: int, stop: int, rank: int, world_size: int) -> np.ndarray:
        """The positions P in [start, stop) with P mod R == r, int64."""
        return np.arange(start + (rank - start) % world_size, stop, world_size, dtype=np.int64)

    def _ids_of_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        numbering, shards, ring_start, ends = self._epoch_plan(epoch)
        lane, index = numbering[positions % self.lanes], positions // self.lanes
        block, within = index // self.block, index % self.block
        shuffled = np.empty_like(within)
        for number in np.unique(block):
            here = block == number
            shuffled[here] = self._block_order(epoch, int(number))[lane[here], within[here]]
        index = block * self.block + shuffled
        ring = (ring_start + lane * (self.length // self.lanes) + index) % self.num_samples
        place = np.searchsorted(ends, ring, side="right")
        shard = shards[place]
        return self._first[shard] + ring - (ends[place] - self._counts[shard])

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Lane numbering [lanes], shard order [shards], start on the ring, ends on the ring."""
        numbering = permutation(self.seed, LANES, epoch, count=self.lanes)
        shards = permutation(self.seed, SHARDS, epoch, count=len(self._counts))
        start = int(random_words(self.seed, RING, epoch, count=1)[0] % np.uint64(self.num_samples))
        return numbering, shards, start, np.cumsum(self._counts[shards])

    def _permute_blocks(self, epoch: int, block: int) -> np.ndarray:
        """The inner order of one block in every lane, int64 [lanes, samples of the block]."""
        size = min(self.block, self.length // self.lanes - block * self.block)
        words = random_words(self.seed, BLOCKS, epoch, block, count=self.lanes * size)
        return np.argsort(words.reshape(self.lanes, size), axis=1, kind="stable")


def sequential_ids(start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """The order of evaluation: every sample of [start, stop) once, rank r reads each R-th."""
    return np.arange(start + rank, stop, world_size, dtype=np.int64)
