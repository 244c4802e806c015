"""Several data sets read as one stream in proportion to their weights.

Weights are integers with sum W. The stream consists of rounds of W rows of C positions, one for
each lane; in a round every lane reads w_d times from data set d, always from the same lane of that
data set's own order. So each data set is read in its own `Order`, and the same holds as for one: a
pure function of seed and position, the same global batches for any number of ranks, each sample
once per epoch of its own data set.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from taming_dist.data.batching import check_shared
from taming_dist.data.order import Order, positions_of
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset, Part, resolve

LARGEST_CYCLE = 1000
PART_KEYS = ("shards", "weight")


def resolve_training(spec: Any) -> Dataset:
    """The data set of `data.train`: a shard spec, or a mapping of names to {shards, weight}.

    Raises:
        UserError: names the part.
    """
    if not isinstance(spec, Mapping):
        return resolve(spec)
    if not spec:
        raise UserError("the mixture is empty: give {NAME: {shards: SPEC, weight: 1}, ...}")
    # By name, so that the order in which they were typed does not matter.
    named = dict(sorted(spec.items()))
    return mix(
        {name: _resolve_part(name, part) for name, part in named.items()},
        whole_weights([_weight(name, part) for name, part in named.items()]),
    )


def _resolve_part(name: str, part: Any) -> Dataset:
    if not isinstance(part, Mapping) or "shards" not in part:
        raise UserError(f"{name}: give it as {{shards: SPEC, weight: 1}}")
    for key in part:
        if key not in PART_KEYS:
            raise UserError(f"there is no key {name}.{key} (there are {', '.join(PART_KEYS)})")
    try:
        return resolve(part["shards"])
    except UserError as error:
        raise UserError(f"{name}.shards: {error}") from error


def _weight(name: str, part: Any) -> float:
    weight = part.get("weight", 1)
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise UserError(f"{name}.weight is {weight!r} but must be a number above 0")
    return weight


def mix(datasets: Mapping[str, Dataset], weights: Sequence[int]) -> Dataset:
    """Several data sets as one; it has classes only if all agree on their names."""
    parts = list(datasets.values())
    classes = parts[0].classes
    agree = all(part.classes == classes and part.classes_agree for part in parts)
    if not agree:
        logging.getLogger(__name__).warning(
            "the data sets %s have different class names: classes are not read", ", ".join(datasets)
        )
    return Dataset(
        locations=sum((part.locations for part in parts), ()),
        shards=sum((part.shards for part in parts), ()),
        indexes=sum((part.indexes for part in parts), ()),
        classes=classes if agree else None,
        classes_agree=agree,
        parts=tuple(
            Part(len(part.shards), weight) for part, weight in zip(parts, weights, strict=True)
        ),
    )


def order_of(
    samples_per_shard: np.ndarray, parts: Sequence[Part], seed: int, lanes: int, block: int
) -> "Order | MixtureOrder":
    """The order of a data set, single or a mixture of `parts`."""
    if not parts:
        return Order(samples_per_shard, seed, lanes, block)
    ends = np.cumsum([part.shards for part in parts])
    counts = np.split(samples_per_shard, ends[:-1])
    return MixtureOrder(counts, [part.weight for part in parts], seed, lanes, block)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportions of `weights`, which are all above 0.

    Raises:
        UserError: their sum is above 1000, as for 0.3333 to 1.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > LARGEST_CYCLE:
        raise UserError(
            f"the weights {', '.join(map(str, weights))} repeat after {sum(whole)} samples, more "
            f"than {LARGEST_CYCLE}: use weights with fewer digits"
        )
    return tuple(whole)


def schedule(weights: Sequence[int], lanes: int) -> np.ndarray:
    """The data set that each lane reads in each row of a round, int64 [W, C].

    They alternate evenly, and each lane reads each in proportion to its weight. From the start to
    any position, two data sets are within one sample of their proportion, more within three.
    """
    total = sum(weights)
    middles = [(np.arange(weight) + 0.5) / weight for weight in weights]
    owners = np.repeat(np.arange(len(weights)), weights)
    cycle = owners[np.argsort(np.concatenate(middles), kind="stable")]
    row, lane = np.arange(total)[:, None], np.arange(lanes)[None]
    # A row continues the cycle where the last one ended. Where that would repeat before the round
    # is over it is shifted by one, so that each lane starts once at each place.
    start = row * lanes + row // (total // math.gcd(lanes, total))
    return cycle[(start + lane) % total]


class MixtureOrder:
    """The order of samples of a mixture; ids are numbered consecutively over its data sets.

    `samples_per_shard` int64 [shards] of each data set; `weights`: integers; `seed`, `lanes`,
    `block` as in `Order`. The blocks of a data set have its share of `block`.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[np.ndarray],
        weights: Sequence[int],
        seed: int,
        lanes: int,
        block: int,
    ) -> None:
        self.lanes, self._rows = lanes, sum(weights)
        rounds = max(1, block // self._rows)
        self.orders = [
            Order(counts, seed, lanes, rounds * weight, part=number)
            for number, (counts, weight) in enumerate(zip(samples_per_shard, weights, strict=True))
        ]
        sizes = [order.num_samples for order in self.orders]
        self.num_samples = sum(sizes)
        self._first_ids = np.cumsum(sizes) - sizes
        self._weights = np.asarray(weights)
        self._window = rounds * self._rows * lanes
        self._owner = schedule(weights, lanes)
        self._nth = np.zeros_like(self._owner)
        for number in range(len(weights)):
            here = self._owner == number
            self._nth[here] = (np.cumsum(here, axis=0) - 1)[here]

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless every rank gets the same number of lanes."""
        check_shared("data.lanes", self.lanes, world_size)

    def ids(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Global sample ids at the positions P in [start, stop) with P mod R == r, int64."""
        self.check_world(world_size)
        owners, places = self.locate(positions_of(start, stop, rank, world_size))
        ids = np.empty(len(owners), dtype=np.int64)
        for number in np.unique(owners):
            here = owners == number
            ids[here] = self._first_ids[number] + self.orders[number].ids_at(places[here])
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position: how often its data set was read completely before."""
        owners, places = self.locate(positions)
        return places // np.array([order.length for order in self.orders])[owners]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The data set at each position, and the position in that data set's own order."""
        row, lane = np.divmod(positions, self.lanes)
        cycle, row = np.divmod(row, self._rows)
        owners = self._owner[row, lane]
        places = (cycle * self._weights[owners] + self._nth[row, lane]) * self.lanes + lane
        return owners, places

    def window_end(self, position: int) -> int:
        """The next position at which a block of every data set ends in all lanes."""
        return (position // self._window + 1) * self._window
