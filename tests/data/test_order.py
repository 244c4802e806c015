import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.data.order import Order, permutation, sequential_ids
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


def test_permutations_stay_the_same_for_ever() -> None:
    # A change here would silently break the resumption of every running experiment.
    assert permutation(7, 1, 3, count=8).tolist() == [1, 7, 2, 6, 4, 0, 3, 5]


def test_more_lanes_than_samples_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.lanes is 256 but the data set has 100"):
        Order(np.array([100]), seed=0, lanes=256, block=4)


def test_ranks_that_do_not_divide_the_lanes_are_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.lanes is 8, which 3 ranks"):
        Order(np.array([100]), seed=0, lanes=8, block=4).ids(0, 24, 0, 3)
