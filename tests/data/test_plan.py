import threading
from itertools import islice
from typing import Any

import numpy as np
import pytest

from taming_dist.data.plan import Plan, reading_threads
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Part


def plan(samples_per_shard: np.ndarray, **options: Any) -> Plan:
    defaults = {"seed": 0, "lanes": 8, "block": 4, "rank": 0, "world_size": 1, "micro_batch": 4}
    return Plan(samples_per_shard, "fingerprint", **(defaults | options))


@pytest.mark.parametrize("longest", [3, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rounds_hold_the_samples_of_the_batches_in_the_same_order(
    world_size: int, longest: int
) -> None:
    mine = plan(np.array([13, 50, 27]), rank=world_size - 1, world_size=world_size)
    start, count = 3 * 8, 240 // world_size
    batches = np.concatenate([batch.ids for batch in islice(mine.training(start), count // 4)])
    rounds = mine.rounds(start, longest)
    ids: list[int] = []
    while len(ids) < count:
        window = next(rounds)
        assert len(window.ids) <= min(longest, mine.round_samples)
        assert len(set(window.epochs.tolist())) == 1
        ids += window.ids.tolist()
    assert ids[:count] == batches[:count].tolist()


def test_rounds_of_a_mixture_hold_the_samples_of_its_batches_too() -> None:
    parts = (Part(2, 3), Part(1, 1))
    mine = plan(np.array([13, 50, 27]), world_size=2, rank=1, parts=parts)
    expected = np.concatenate([batch.ids for batch in islice(mine.training(16), 60)])
    rounds = mine.rounds(16, mine.round_samples)
    found = np.concatenate([window.ids for window in islice(rounds, 30)])
    assert found[:240].tolist() == expected.tolist()


def test_a_start_that_the_ranks_cannot_share_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.global_batch must be a multiple"):
        plan(np.array([80]), world_size=4).check_start(6)


@pytest.mark.parametrize(
    ("classes", "per_class", "shard", "global_batch"),
    [(1000, 1281, 1000, 256), (1000, 130, 1000, 256), (100, 640, 1000, 12), (1000, 130, 500, 64)],
)
def test_batches_of_class_sorted_shards_hold_at_least_95_percent_of_the_classes_of_iid_draws(
    classes: int, per_class: int, shard: int, global_batch: int
) -> None:
    samples = classes * per_class
    sizes = np.full(samples // shard, shard)
    order = plan(sizes, lanes=256, block=64).order  # the defaults
    rng = np.random.default_rng(0)
    found = []
    for start in rng.integers(0, order.length // global_batch, 300).tolist():
        ids = order.ids(start * global_batch, (start + 1) * global_batch)
        found.append(len(np.unique(ids // per_class)))
    iid = classes * (1 - (1 - 1 / classes) ** global_batch)
    assert np.mean(found) >= 0.95 * iid


def test_a_wait_that_is_broken_off_does_not_wait_for_the_threads_that_hang() -> None:
    hangs, pending = threading.Event(), []

    def wait() -> None:
        with reading_threads(1) as pool:
            pending.append(pool.submit(hangs.wait))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        wait()
    assert not pending[0].done()
    hangs.set()
    assert pending[0].result()
