import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taming_dist.data import fetching
from taming_dist.data.fetching import Shards, fetch, plan_runs
from taming_dist.data.plan import Plan, Selection
from taming_dist.formats.manifest import resolve
from taming_dist.formats.shards import read_sample
from taming_dist.formats.storage import Bytes

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_images: Write) -> Shards:
    return Shards(resolve(str(write_images(tmp_path_factory.mktemp("s"), 128, 50))))


def plan(shards: Shards, **place: int) -> Plan:
    dataset = shards.dataset
    options = {"rank": 0, "world_size": 1, "micro_batch": 6} | place
    return Plan(dataset.samples_per_shard, dataset.fingerprint, 3, 4, 8, **options)


class AtOnce(Executor):
    """Does everything in the moment that it is submitted, so that counts can be compared."""

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


class Watched(Shards):
    """Notes what is read, and how many samples are held."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(shards.dataset)
        self.reads: list[tuple[int, int, int]] = []

    def read(self, shard: int, first: int, count: int) -> list[Bytes]:
        self.reads.append((shard, first, count))
        return super().read(shard, first, count)


def test_a_block_is_one_read_or_two_where_it_crosses_shards(shards: Shards) -> None:
    round_ = next(plan(shards).rounds(0, longest=1000))
    assert len(round_.ids) == 32  # 4 lanes x 8 samples
    _, runs = plan_runs(round_, shards, longest=8)
    assert 4 <= len(runs) <= 4 + 2
    assert sum(run.count for run in runs) == 32


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_byte_is_read_once_and_every_sample_gets_its_own(
    shards: Shards, world_size: int
) -> None:
    watched = Watched(shards)
    mine = plan(shards, world_size=world_size)
    rounds = mine.rounds(0, longest=1000)
    tickets = list(islice(fetch(rounds, watched, AtOnce(), 32 // world_size, 8), 64 // world_size))
    samples = [ticket.take(watched) for ticket in tickets]
    selections = mine.training(0)
    expected = np.concatenate([next(selections).ids for _ in range(11)])[: len(tickets)]
    assert [ticket.id for ticket in tickets] == expected.tolist()
    for ticket, data in zip(tickets, samples, strict=True):
        assert data == shards.read(ticket.run.shard, ticket.run.first + ticket.place, 1)[0]
    # Two of the four rounds of the epoch are over, and the reads of the third have begun.
    places = [(shard, first + k) for shard, first, count in watched.reads for k in range(count)]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("longest", [1, 5, 32])
def test_no_more_is_held_than_was_allowed_and_reading_never_waits_for_itself(
    shards: Shards, longest: int
) -> None:
    watched = Watched(shards)
    rounds = plan(shards).rounds(12, longest)  # from the middle of a round
    tickets = fetch(rounds, watched, AtOnce(), ahead=longest, longest=8)
    for taken, ticket in enumerate(islice(tickets, 200)):
        ticket.take(watched)
        assert sum(count for _, _, count in watched.reads) - taken <= longest + 1


def test_reading_is_even_over_a_round(shards: Shards) -> None:
    watched = Watched(shards)
    tickets = fetch(plan(shards).rounds(0, 1000), watched, AtOnce(), ahead=32, longest=8)
    read = []
    for ticket in islice(tickets, 96):
        ticket.take(watched)
        read.append(sum(count for _, _, count in watched.reads))
    grown = np.diff([read[k] for k in range(32, 96, 16)])
    assert grown.min() >= 8  # about as much is read as is taken
    assert grown.max() <= 24


def test_a_sample_that_is_wanted_twice_is_read_twice(shards: Shards) -> None:
    ids = np.array([7, 8, 7, 127, 9])
    tickets, runs = plan_runs(Selection(ids, np.zeros_like(ids)), shards, longest=8)
    assert [ticket.id for ticket in tickets] == ids.tolist()
    assert [(run.shard, run.first + place) for run in runs for place in range(run.count)].count(
        (0, 7)
    ) == 2
    assert sum(run.count for run in runs) == 5


def test_what_reading_raises_comes_out_where_the_sample_is_taken(shards: Shards) -> None:
    class Unreadable(Shards):
        def read(self, shard: int, first: int, count: int) -> list[Bytes]:
            raise OSError("the disk is gone")

    unreadable = Unreadable(shards.dataset)
    tickets = fetch(plan(shards).rounds(0, 32), unreadable, AtOnce(), 32, 8)
    with pytest.raises(OSError, match="the disk is gone"):
        next(tickets).take(unreadable)


def test_a_shard_that_does_not_answer_is_named_once_and_its_samples_still_come(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()

    class Hanging(Shards):
        def read(self, shard: int, first: int, count: int) -> list[Bytes]:
            answer.wait()
            return super().read(shard, first, count)

    monkeypatch.setattr(fetching, "SLOW_S", 0.01)
    hanging, ids = Hanging(shards.dataset), np.arange(3)
    window = Selection(ids, np.zeros_like(ids))
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(3) as takers:
        tickets = fetch([window], hanging, pool, ahead=8, longest=8)
        taken = [takers.submit(ticket.take, hanging) for ticket in tickets]
        while not caplog.messages:
            time.sleep(0.01)
        answer.set()
        expected = shards.read(0, 0, 3)
        assert [future.result() for future in taken] == expected
    named = {f"no answer from {shards.location(0)} for 0 s: still waiting"}
    assert set(caplog.messages) == named


def test_more_shards_than_files_may_be_open_are_read_by_two_readers(
    tmp_path: Path, write_images: Write, few_files: int
) -> None:
    folders = [write_images(tmp_path / name, samples=2 * few_files, shard=1) for name in "ab"]
    readers = [Shards(resolve(str(folder))) for folder in folders]
    for _ in range(2):
        for number in range(2 * few_files):
            for shards in readers:
                key, _files = read_sample(shards.read(number, 0, 1)[0])
                assert key == f"{number:04d}"
