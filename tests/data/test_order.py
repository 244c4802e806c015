from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.data.order import Order, permutation, random_words, sequential_ids
from taming_dist.errors import UserError

RANKS = (1, 2, 4, 8)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    counts[0] += 40
    lanes = draw(st.sampled_from([8, 16, 24, 40]))
    return Order(np.array(counts), draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 9)))


@given(orders(), st.integers(0, 500), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_any_number_of_ranks_sees_the_same_global_batches(
    order: Order, batch: int, size: int
) -> None:
    start, stop = batch * size * 8, (batch + 1) * size * 8
    whole = order.ids(start, stop)
    for world_size in RANKS:
        parts = [order.ids(start, stop, rank, world_size) for rank in range(world_size)]
        assert np.stack(parts, axis=1).ravel().tolist() == whole.tolist()


@given(orders(), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_an_epoch_reads_every_kept_sample_exactly_once(order: Order, epoch: int) -> None:
    ids = order.ids(epoch * order.length, (epoch + 1) * order.length)
    assert len(set(ids.tolist())) == order.length
    assert ids.min() >= 0
    assert ids.max() < order.num_samples
    assert order.num_samples - order.length < order.lanes


@given(orders(), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_reading_resumes_at_any_position(order: Order, start: int, first: int, then: int) -> None:
    whole = order.ids(start, start + first + then)
    fresh = Order(order._counts, order.seed, order.lanes, order.block)
    assert fresh.ids(start + first, start + first + then).tolist() == whole[first:].tolist()


def test_epochs_differ_in_order_and_in_what_they_leave_out() -> None:
    order = Order(np.array([103]), seed=1, lanes=8, block=4)
    epochs = [order.ids(e * order.length, (e + 1) * order.length) for e in range(20)]
    assert len({tuple(ids) for ids in epochs}) == 20
    left_out = {frozenset(set(range(103)) - set(ids.tolist())) for ids in epochs}
    assert len(left_out) > 10


def test_seeds_differ() -> None:
    one, other = (Order(np.array([64]), seed, 8, 4).ids(0, 64).tolist() for seed in (0, 1))
    assert one != other


def test_a_batch_smaller_than_the_lanes_mixes_class_sorted_shards() -> None:
    order = Order(np.full(16, 64), seed=0, lanes=64, block=16)
    classes = [len(set((order.ids(b * 16, b * 16 + 16) // 64).tolist())) for b in range(64)]
    assert np.mean(classes) > 8  # 16 draws from 16 classes at random give 10.3


def test_evaluation_reads_every_sample_once() -> None:
    parts = [sequential_ids(0, 11, rank, 4).tolist() for rank in range(4)]
    assert sorted(sum(parts, [])) == list(range(11))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_bounded_evaluation_reads_the_same_evenly_spread_samples_on_any_ranks(
    world_size: int,
) -> None:
    parts = [
        sequential_ids(3, 103, rank, world_size, most=7).tolist() for rank in range(world_size)
    ]
    assert sorted(sum(parts, [])) == [3, 17, 31, 45, 60, 74, 88]


@pytest.mark.parametrize("most", [0, 11, 12, 1000])
def test_a_bound_that_is_no_bound_reads_every_sample(most: int) -> None:
    assert sequential_ids(0, 11, most=most).tolist() == list(range(11))


def test_permutations_stay_the_same_for_ever() -> None:
    # A change here would silently break the resumption of every running experiment.
    assert permutation(7, 1, 3, count=8).tolist() == [1, 7, 2, 6, 4, 0, 3, 5]


@pytest.mark.parametrize(
    ("part", "start", "ids"),
    [
        (None, 0, [33, 1, 53, 26, 95, 2, 55, 28, 32, 3, 56, 29, 31, 4]),
        (None, 86, [74, 90, 52, 24, 0, 92, 50, 23, 75, 91, 33, 8, 55, 80]),
        (None, 96016, [19, 69, 46, 89, 23, 74, 51, 90, 22, 0, 50, 92, 24, 73]),
        (1, 0, [91, 20, 51, 0, 90, 21, 50, 73, 93, 24, 49, 75, 92, 23]),
        (1, 86, [69, 19, 45, 87, 70, 17, 44, 85, 68, 16, 90, 73, 49, 21]),
        (1, 96016, [63, 87, 40, 14, 69, 94, 46, 22, 67, 92, 45, 19, 70, 90]),
    ],
)
def test_the_order_stays_the_same_for_ever(part: int | None, start: int, ids: list[int]) -> None:
    # Over the ends of blocks, from 86 also over that of an epoch.
    order = Order(np.array([31, 0, 45, 20]), seed=2**64 - 5, lanes=4, block=5, part=part)
    assert order.length == 96
    assert order.ids(start, start + len(ids)).tolist() == ids


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**64 - 1), max_size=3),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_random_words_are_those_of_a_philox_that_is_new(
    seed: int, purpose: int, counter: list[int], count: int
) -> None:
    key = np.array([seed, purpose], dtype=np.uint64)
    start = np.array([0, *counter, 0, 0, 0][:4], dtype=np.uint64)
    fresh = np.random.Philox(key=key, counter=start).random_raw(count)
    found = random_words(seed, purpose, *counter, count=count)
    assert (found.dtype, found.tolist()) == (np.uint64, fresh.tolist())


def test_threads_do_not_disturb_each_others_random_words() -> None:
    def words(seed: int) -> list[list[int]]:
        return [random_words(seed, 1, n, count=50).tolist() for n in range(200)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(words, range(8))) == [words(seed) for seed in range(8)]


def test_more_lanes_than_samples_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.lanes is 256 but the data set has 100"):
        Order(np.array([100]), seed=0, lanes=256, block=4)


def test_ranks_that_do_not_divide_the_lanes_are_a_users_mistake() -> None:
    with pytest.raises(
        UserError, match=r"data\.lanes=8 is not a multiple of the number of ranks, 3"
    ):
        Order(np.array([100]), seed=0, lanes=8, block=4).ids(0, 24, 0, 3)
