import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.data.decoding import Filled
from taming_dist.data.images import Preprocess, RandomCrop
from taming_dist.data.mixture import MixtureOrder, resolve_training, schedule, whole_weights
from taming_dist.data.order import Order
from taming_dist.data.reader import Reader, Reading
from taming_dist.data.slots import Rows
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from tests.data.pictures import jpeg
from tests.data.shard_files import writing_shards

LANES = (8, 16, 24)


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOrder:
    counts = draw(
        st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=2, max_size=4)
    )
    weights = whole_weights([draw(st.integers(1, 9)) for _ in counts])
    arrays = [np.array([24 + first, *others]) for first, *others in counts]
    lanes, block = draw(st.sampled_from(LANES)), draw(st.integers(1, 40))
    return MixtureOrder(arrays, weights, draw(st.integers(0, 2**40)), lanes, block)


@given(mixtures(), st.integers(0, 100), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_any_number_of_ranks_sees_the_same_global_batches_from_any_place(
    order: MixtureOrder, batch: int, size: int
) -> None:
    start, stop = batch * size * 8, (batch + 1) * size * 8
    whole = order.ids(0, stop)[start:]
    for world_size in (1, 2, 4, 8):
        parts = [order.ids(start, stop, rank, world_size) for rank in range(world_size)]
        assert np.stack(parts, axis=1).ravel().tolist() == whole.tolist()


@given(mixtures(), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_each_data_set_is_read_whole_before_any_sample_of_it_comes_again(
    order: MixtureOrder, epoch: int
) -> None:
    positions = np.arange(0, order._rows * max(part.length for part in order.orders) * 5)
    ids, epochs, owners = (
        order.ids(0, len(positions)),
        order.epochs(positions),
        order.locate(positions)[0],
    )
    ends = np.cumsum([part.num_samples for part in order.orders])
    assert (np.searchsorted(ends, ids, side="right") == owners).all()
    for number, part in enumerate(order.orders):
        read = ids[(owners == number) & (epochs == epoch)]
        assert len(read) == len(set(read.tolist())) == part.length


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.sampled_from([4, 7, 12, 64]))
@settings(max_examples=60, deadline=None)
def test_every_stretch_holds_each_data_set_in_its_proportion(
    weights: list[int], lanes: int
) -> None:
    weights = list(whole_weights(weights))
    owners = schedule(weights, lanes)
    for number, weight in enumerate(weights):
        here = owners == number
        assert (here.sum(axis=0) == weight).all()  # each lane, in each round
        above = np.concatenate([[0], np.cumsum(here.ravel() - weight / sum(weights))])
        assert np.abs(above).max() < (1 if len(weights) == 2 else 3)
        assert np.ptp(above) < (2 if len(weights) == 2 else 6)


def test_a_rank_keeps_to_its_lanes_of_every_data_set() -> None:
    order = MixtureOrder([np.array([90]), np.array([50, 31])], (2, 1), 3, 8, 6)
    for rank in range(4):
        owners, places = order.locate(np.arange(rank, 4000, 4))
        assert set((places % 4).tolist()) == {rank}
        assert set(owners.tolist()) == {0, 1}


def test_blocks_of_all_data_sets_end_together_for_ever() -> None:
    order = MixtureOrder([np.array([950]), np.array([300, 131])], (3, 1), 3, 8, 12)
    window = order.window_end(0)
    assert window == 12 * 8
    assert order.window_end(window - 1) == window
    assert order.window_end(window) == 2 * window
    for start in range(0, 40 * window, window):  # many epochs of both
        ids = np.sort(order.ids(start, start + window))
        for number, weight in enumerate((3, 1)):
            mine = ids[(ids >= 950) == bool(number)]
            assert len(mine) == weight * 3 * 8
            runs = 1 + int((np.diff(mine) != 1).sum())
            # One run per lane, more where an epoch, the ring or a shard ends inside.
            assert runs <= 8 * 2 + 4


def test_data_sets_of_one_size_are_not_read_in_one_order() -> None:
    order = MixtureOrder([np.array([64]), np.array([64])], (1, 1), 3, 8, 8)
    one, other = (part.ids_at(np.arange(64)).tolist() for part in order.orders)
    assert one != other


def test_a_change_of_weights_leaves_the_order_inside_each_data_set() -> None:
    arrays = [np.array([70]), np.array([80])]
    firsts = [
        MixtureOrder(arrays, weights, 3, 8, 8).orders[0]._epoch_plan(0)
        for weights in ((1, 1), (2, 1))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(*firsts, strict=True))


def test_weights_are_proportions() -> None:
    assert whole_weights([2, 1]) == (2, 1)
    assert whole_weights([1.0, 0.5, 0.25]) == (4, 2, 1)
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert math.gcd(*whole_weights([300, 900])) == 1
    with pytest.raises(UserError, match=r"0\.3333, 1 repeat after 13333 samples"):
        whole_weights([0.3333, 1])


def test_the_order_of_a_single_data_set_stays_the_same_for_ever() -> None:
    # A change here would silently break the resumption of every running experiment.
    ids = Order(np.array([9, 14]), seed=5, lanes=4, block=3).ids(0, 60)
    assert ids[::7].tolist() == [21, 7, 13, 6, 10, 18, 13, 22, 10]
    assert int((ids * np.arange(1, 61)).sum()) == 22186


def write(folder: Path, count: int, classes: tuple[str, ...] | None) -> str:
    with writing_shards(folder, "train", 10, classes) as write:
        for number in range(count):
            write(f"{folder.name}/{number}", {"jpg": jpeg(number), "cls": b"1"})
    return str(folder)


def reader(spec: Any, rank: int = 0, world_size: int = 1) -> Reader:
    preprocess = Preprocess(8, RandomCrop(), flip=True)
    reading = Reading(preprocess, 8 // world_size, rank=rank, world_size=world_size)
    return Reader(resolve_training(spec), reading, lanes=8, block=6)


def test_a_mixture_is_read_in_proportion_and_goes_on_on_other_ranks(
    tmp_path: Path, train_inline: Callable[..., list[tuple[Filled, Rows]]]
) -> None:
    spec = {
        "photos": {"shards": write(tmp_path / "photos", 25, ("a", "b")), "weight": 2},
        "art": {"shards": write(tmp_path / "art", 12, ("a", "b"))},
    }
    assert reader(spec).has_classes
    whole = train_inline(reader(spec), 0, 12)
    keys = [key.partition("/")[0] for filled, _ in whole for key in filled.keys]
    assert keys.count("photos") == 64
    assert all(2 <= keys[at : at + 8].count("art") <= 3 for at in range(0, 96, 8))
    parts = [train_inline(reader(spec, rank, 2), 40, 7) for rank in range(2)]
    for number, (_, rows) in enumerate(whole[5:]):
        again = np.stack([part[number][1].columns["image"] for part in parts], axis=1)
        assert np.array_equal(rows.columns["image"], again.reshape(rows.columns["image"].shape))
    turned = train_inline(reader(dict(reversed(spec.items()))), 0, 2)
    assert [filled.keys for filled, _ in turned] == [filled.keys for filled, _ in whole[:2]]


def test_weights_and_shards_are_in_the_fingerprint(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, 12, None) for name in ("one", "two"))
    prints = {
        resolve_training({"a": {"shards": a, "weight": w}, "b": {"shards": two}}).fingerprint
        for a, w in ((one, 1), (one, 2), (two, 1))
    }
    assert len(prints) == 3
    same = [
        {"a": {"shards": one, "weight": w}, "b": {"shards": two, "weight": 3 * w}} for w in (1, 2)
    ]
    assert len({resolve_training(spec).fingerprint for spec in same}) == 1
    assert resolve_training(one).fingerprint == resolve(one).fingerprint
    assert resolve_training([one, two]).fingerprint == resolve([one, two]).fingerprint


def test_data_sets_of_other_classes_mix_without_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {
        name: {"shards": write(tmp_path / name, 12, classes)}
        for name, classes in (("one", ("a", "b")), ("two", ("b", "a")))
    }
    assert not reader(spec).has_classes
    assert "one, two have different class names: classes are not read" in caplog.text


def test_a_mistake_in_a_mixture_is_one_line_that_names_the_part(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", 12, None)
    for spec, message in (
        ({}, "the mixture is empty"),
        ({"a": folder}, r"a: give it as \{shards: SPEC"),
        ({"a": {"weight": 2}}, r"a: give it as \{shards: SPEC"),
        ({"a": {"shards": folder, "wieght": 2}}, r"no key a\.wieght"),
        ({"a": {"shards": folder, "weight": 0}}, r"a\.weight is 0 but"),
        ({"a": {"shards": folder, "weight": True}}, r"a\.weight is True but"),
        ({"a": {"shards": folder, "weight": "2"}}, r"a\.weight is '2' but"),
        ({"a": {"shards": f"{folder}-none"}}, r"a\.shards: .*one-none"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_training(spec)
    dataset = resolve_training({"a": {"shards": folder}})
    source = Reader(dataset, Reading(Preprocess(8), 1), lanes=16)
    with pytest.raises(UserError, match=r"data\.lanes is 16 but .*12"):
        source.batches(0)
