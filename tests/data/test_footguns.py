"""What has bitten users of stock webdataset pipelines, and cannot happen here.

Numbers are those of the list in docs/reading.md. Those of storage (truncated tars, pipes, caches)
are in test_storage_footguns.py.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taming_dist.data.fetching import Shards
from taming_dist.data.images import Preprocess
from taming_dist.data.plan import Plan
from taming_dist.data.reader import Reader, Reading
from taming_dist.formats.manifest import Manifest, resolve, write_index
from taming_dist.formats.shards import scan

Write = Callable[..., Path]
SHARDS = np.full(8, 10)


def plan(samples_per_shard: np.ndarray = SHARDS, **options: Any) -> Plan:
    defaults = {"seed": 0, "lanes": 8, "block": 4, "rank": 0, "world_size": 1, "micro_batch": 4}
    return Plan(samples_per_shard, "fingerprint", **(defaults | options))


def epoch_ids(place: Plan, epoch: int) -> list[int]:
    """What a rank reads in an epoch."""
    start, stop = epoch * place.order.length, (epoch + 1) * place.order.length
    return place.order.ids(start, stop, place.rank, place.world_size).tolist()


def test_1_no_two_epochs_have_the_same_order_of_shards() -> None:
    orders = {tuple(id // 10 for id in epoch_ids(plan(), epoch)) for epoch in range(6)}
    assert len(orders) == 6


def test_2_an_epoch_does_not_begin_again_because_an_object_does() -> None:
    length = plan().order.length
    fresh = next(plan().training(2 * length))
    assert fresh.epochs.tolist() == [2] * 4
    assert fresh.ids.tolist() == epoch_ids(plan(), 2)[:4]


def test_3_a_rank_does_not_see_the_same_shards_in_every_epoch() -> None:
    place = plan(np.full(64, 2), rank=1, world_size=4, lanes=4, block=2)
    seen = [{id // 2 for id in epoch_ids(place, epoch)} for epoch in range(5)]
    assert len(set.union(*seen)) > 2 * max(map(len, seen))


@given(st.lists(st.integers(1, 20), min_size=8, max_size=12), st.sampled_from([1, 2, 3, 4, 6]))
def test_4_every_rank_has_as_many_steps_whatever_the_shards_hold(
    samples_per_shard: list[int], world_size: int
) -> None:
    sizes = np.array(samples_per_shard) + 2
    counts = {
        len(epoch_ids(plan(sizes, rank=rank, world_size=world_size, lanes=12), 0))
        for rank in range(world_size)
    }
    assert len(counts) == 1


def test_5_one_shard_is_enough_for_many_ranks_and_threads(
    tmp_path: Path, write_images: Write, train_inline: Callable[..., list]
) -> None:
    dataset = resolve(str(write_images(tmp_path, samples=32, shard=32)))
    for rank in (0, 7):
        reading = Reading(Preprocess(6), micro_batch=1, rank=rank, world_size=8)
        reader = Reader(dataset, reading, lanes=8, block=2)
        assert len(train_inline(reader, 0, 6, threads=5)) == 6


def test_6_nothing_comes_twice_in_an_epoch() -> None:
    ids = [id for rank in range(4) for id in epoch_ids(plan(rank=rank, world_size=4, lanes=16), 3)]
    assert sorted(ids) == list(range(80))


def test_7_the_tail_that_is_left_out_is_another_one_in_each_epoch() -> None:
    place = plan(np.array([7, 40, 40]))  # 7 of 87 samples do not fit 8 lanes
    left_out = [set(range(87)) - set(epoch_ids(place, epoch)) for epoch in range(30)]
    assert all(len(tail) == 7 for tail in left_out)
    assert set.intersection(*left_out) == set()
    assert len(set.union(*left_out)) > 60


ORDER = """
import json, numpy as np
from taming_dist.data.plan import Plan
plan = Plan(np.full(8, 10), "fingerprint", 0, 8, 4, 0, 1, 4)
print(json.dumps(next(plan.rounds(0, 100)).ids.tolist()))
"""


def test_13_and_14_the_order_is_the_same_under_any_environment() -> None:
    stale = {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "3", "WDS_SEED": "7"}
    environment = os.environ | stale | {"PYTHONHASHSEED": "123"}
    done = subprocess.run(
        [sys.executable, "-c", ORDER], env=environment, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == next(plan().rounds(0, 100)).ids.tolist()


def tar_of(path: Path, names: list[str], image: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))


def test_15_dots_in_names_and_keys_shared_by_shards_lose_nothing(
    tmp_path: Path, image_bytes: Callable[[int], bytes]
) -> None:
    tar_of(tmp_path / "a.tar", ["x.png", "img.v1.png", "README", "last.png"], image_bytes(1))
    tar_of(tmp_path / "b.tar", ["last.png", "x.png"], image_bytes(2))
    found = [scan(path) for path in sorted(tmp_path.glob("*.tar"))]
    for name, (_, offsets) in zip("ab", found, strict=True):
        write_index(tmp_path / f"{name}.tar", offsets)
    Manifest("taming_dist.images.v1", tuple(shard for shard, _ in found)).save(tmp_path)
    reader = Reader(resolve(str(tmp_path)), Reading(Preprocess(6), 8, max_bad_fraction=1.0))
    (batch,) = reader.epoch_batches()
    assert batch.keys == ["x", "last", "last", "x"]
    assert reader.num_read == 5  # "img" has no column png, only v1.png, and is reported
    assert reader.num_bad == 1


def test_16_no_byte_of_a_shard_is_read_that_is_not_used(
    tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Shards.read

    def watched(self: Shards, shard: int, first: int, count: int) -> list[bytes]:
        samples = original(self, shard, first, count)
        read.append(sum(map(len, samples)))
        return samples

    monkeypatch.setattr(Shards, "read", watched)
    dataset = resolve(str(write_images(tmp_path, 64, 64)))
    reader = Reader(dataset, Reading(Preprocess(6), micro_batch=16))
    assert sum(map(len, islice(reader.epoch_batches(), 4))) == 64
    assert sum(read) == dataset.shards[0].bytes - 1024  # all but the mark at the end
    assert len(read) == 4
