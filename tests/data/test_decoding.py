"""What the process of a reader computes, without the process; see test_worker.py for that."""

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.data.images import Preprocess, RandomResizedCrop
from taming_dist.data.reader import Reader
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from tests.data.readers import reader_of

Write = Callable[..., Path]
Inline = Callable[..., list]
PREPROCESS = Preprocess(6, RandomResizedCrop((0.3, 1.0)), flip=True)


def reader(folder: Path, **options: Any) -> Reader:
    defaults = {"seed": 5, "lanes": 8, "block": 4, "micro_batch": 4}
    return reader_of(resolve(str(folder)), PREPROCESS, **(defaults | options))


@st.composite
def sets(draw: st.DrawFn) -> dict[str, int]:
    return {
        "samples": draw(st.integers(24, 90)),
        "shard": draw(st.integers(1, 40)),
        "block": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 2**40)),
        "stop": draw(st.integers(0, 12)),
        "threads": draw(st.integers(1, 4)),
    }


def check_resumption(write_images: Write, train_inline: Inline, drawn: dict[str, int]) -> None:
    """The global batches of one rank, against those after a stop on 2, 4 and 8 ranks."""
    options = {"seed": drawn["seed"], "block": drawn["block"], "lanes": 8}
    with TemporaryDirectory() as folder:
        path = write_images(Path(folder), drawn["samples"], drawn["shard"])

        def global_batches(world_size: int, first: int, count: int, threads: int) -> np.ndarray:
            micro = {"micro_batch": 8 // world_size, "world_size": world_size}
            ranks = [reader(path, rank=rank, **micro, **options) for rank in range(world_size)]
            read = [train_inline(rank, first * 8, count, threads) for rank in ranks]
            parts = [np.stack([rows.columns["image"] for _, rows in batches]) for batches in read]
            return np.stack(parts, axis=2).reshape(count, 8, 6, 6, 3)

        stop, count = drawn["stop"], 14  # at least one epoch
        whole = global_batches(1, 0, count, threads=1)
        for world_size in (1, 2, 4, 8):
            rest = global_batches(world_size, stop, count - stop, drawn["threads"])
            assert np.array_equal(rest, whole[stop:])


@given(sets())
@settings(max_examples=6, deadline=None)
def test_stopped_anywhere_and_resumed_on_other_ranks_the_global_batches_are_the_same_bits(
    write_images: Write, train_inline: Inline, drawn: dict[str, int]
) -> None:
    check_resumption(write_images, train_inline, drawn)


@pytest.mark.slow
@given(sets())
@settings(max_examples=150, deadline=None)
def test_the_same_over_many_data_sets_seeds_and_stops(
    write_images: Write, train_inline: Inline, drawn: dict[str, int]
) -> None:
    check_resumption(write_images, train_inline, drawn)


@given(sets())
@settings(max_examples=6, deadline=None)
def test_an_epoch_reads_every_sample_once(
    write_images: Write, train_inline: Inline, drawn: dict[str, int]
) -> None:
    with TemporaryDirectory() as folder:
        path = write_images(Path(folder), drawn["samples"], drawn["shard"])
        source = reader(path, seed=drawn["seed"], block=drawn["block"], micro_batch=8)
        length = source.plan.order.length
        batches = train_inline(source, 0, 2 * length // 8, drawn["threads"])
    ids = np.concatenate([rows.ids for _, rows in batches])
    keys = [int(key) for filled, _ in batches for key in filled.keys]
    assert keys == ids.tolist()
    for start, stop in pairwise(range(0, 2 * length + 1, length)):
        assert len(set(keys[start:stop])) == length


def test_a_bad_sample_is_replaced_by_its_neighbour_and_shifts_nobody(
    tmp_path: Path, write_images: Write, train_inline: Inline
) -> None:
    good = reader(write_images(tmp_path / "good"))
    bad = reader(write_images(tmp_path / "bad", bad=(3, 24, 89)))
    count = 22  # one epoch of 88 samples
    replaced = {3: 4, 24: 0, 89: 75}  # cyclic in the shard
    read = train_inline(bad, 0, count)
    expected = [id for _, rows in train_inline(good, 0, count) for id in rows.ids.tolist()]
    found = [id for _, rows in read for id in rows.ids.tolist()]
    assert found == [replaced.get(id, id) for id in expected]
    records = [record for filled, _ in read for record in filled.bad]
    assert [int(r["key"]) for r in records] == [id for id in expected if id in replaced]
    assert records[0]["shard"].endswith(".tar")
    assert records[0]["offset"] % 512 == 0
    assert records[0]["error"] == "the image is not a JPEG, PNG or WebP file"


def test_a_replacement_is_cut_as_it_would_be_in_its_own_place(
    tmp_path: Path, write_images: Write, train_inline: Inline
) -> None:
    path = write_images(tmp_path, bad=(3,))
    whole = np.concatenate([rows.columns["image"] for _, rows in train_inline(reader(path), 0, 22)])
    again = train_inline(reader(path, world_size=2, rank=1, micro_batch=2), 0, 22, threads=3)
    assert np.array_equal(np.concatenate([rows.columns["image"] for _, rows in again]), whole[1::2])


def test_a_shard_without_a_single_good_sample_is_an_error(
    tmp_path: Path, write_images: Write, train_inline: Inline
) -> None:
    source = reader(write_images(tmp_path, bad=range(25, 50)))
    with pytest.raises(UserError, match=r"no sample of .*train-000001\.tar"):
        train_inline(source, 0, 22)


def test_a_decoder_travels_to_another_process(tmp_path: Path, write_images: Write) -> None:
    decoder = reader(write_images(tmp_path, cls=lambda n: b"%d" % n)).decoder
    decoder.plan.order  # noqa: B018  made, with caches that cannot travel
    copy = pickle.loads(pickle.dumps(decoder))
    assert copy.layout == decoder.layout
    assert copy.plan.order.ids(0, 8).tolist() == decoder.plan.order.ids(0, 8).tolist()
