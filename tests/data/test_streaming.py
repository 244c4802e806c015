from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.data import streaming
from taming_dist.data.images import Preprocess, RandomCrop
from taming_dist.data.reader import Batch, Reading
from taming_dist.data.streaming import StreamingReader, StreamPlan, stream_locations
from taming_dist.errors import UserError
from taming_dist.formats.storage import Patience, StorageError, copy_in_sequence
from tests.data.damage import cut, encode
from tests.data.pictures import jpeg
from tests.data.shard_files import writing_shards

SHARDS, SAMPLES = 3, 10


@pytest.fixture(autouse=True)
def in_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shuffle buffer, which holds several passes over so few samples."""
    monkeypatch.setattr(streaming, "SHUFFLED", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with writing_shards(tmp_path / "set", "s", SAMPLES) as write:
        for number in range(SHARDS * SAMPLES):
            write(f"{number:04d}", {"jpg": jpeg(number), "cls": b"%d" % number})
    for path in (tmp_path / "set").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return tmp_path / "set"


def batches(spec: Any, start: int, count: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    preprocess = Preprocess(8, RandomCrop(), flip=True)
    reading = Reading(preprocess, micro_batch=5, seed=4, rank=rank, world_size=ranks)
    reader = StreamingReader(stream_locations(spec, allow_pipe=True), reading)
    return list(islice(reader.batches(start), count))


def keys(found: list[Batch]) -> list[str]:
    return [key for batch in found for key in batch.keys]


def test_pipes_are_read_with_classes_and_the_same_again(folder: Path) -> None:
    spec = f"pipe:cat {folder}/s-{{000000..000002}}.tar | cat"
    found, again = batches(spec, 0, 6), batches(spec, 0, 6)
    assert sorted(keys(found)) == [f"{number:04d}" for number in range(SHARDS * SAMPLES)]
    assert all(
        torch.equal(one.columns["image"], other.columns["image"])
        for one, other in zip(found, again, strict=True)
    )
    assert found[0].columns["image"].shape == (5, 3, 8, 8)
    assert found[0].classes is not None
    assert found[0].classes.tolist() == [int(key) for key in found[0].keys]


def test_samples_of_several_shards_are_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SHUFFLED", 20)
    found = batches(f"{folder}/*.tar", 0, 6)
    assert all(len({key[:3] for key in batch.keys}) > 1 for batch in found[1:])
    assert keys(found) == keys(batches(f"{folder}/*.tar", 0, 6))


def test_every_rank_has_batches_without_end_and_no_two_read_one_shard(folder: Path) -> None:
    spec = f"{folder}/*.tar"
    parts = [batches(spec, 0, 8, rank, 4) for rank in range(4)]
    assert [len(part) for part in parts] == [8] * 4
    firsts = [{key[:3] for key in keys(part[:2])} for part in parts[:3]]
    assert set.union(*firsts) == {"000", "001", "002"}
    assert all(len(first) == 1 for first in firsts)


def test_a_resumed_run_goes_on_at_another_place(folder: Path) -> None:
    plan = StreamPlan(tuple("abcdefgh"), 4, 0, 1, 5)
    assert list(islice(plan.shards(0), 8)) != list(islice(plan.shards(40), 8))
    assert sorted(islice(plan.shards(40), 8)) == list("abcdefgh")
    plan.check_state(plan.state(40))
    with pytest.raises(UserError, match=r"data\.train names other shards"):
        StreamPlan(("a",), 4, 0, 1, 5).check_state(plan.state(40))


def test_a_server_without_ranges_is_read_and_a_broken_answer_is_begun_anew(
    folder: Path, server: Any, tmp_path: Path
) -> None:
    data = (folder / "s-000000.tar").read_bytes()
    (server.folder / "a.tar").write_bytes(data)
    server.faults += ["short", "reset", "503", "stall", "chunked"]
    hurried = Patience(attempts=5, first_wait_s=0.001, timeout_s=0.3)
    copy_in_sequence(f"{server.url}/a.tar", tmp_path / "copy", hurried)
    assert (tmp_path / "copy").read_bytes() == data
    assert sorted(keys(batches(f"{server.url}/a.tar", 0, 2))) == [f"{n:04d}" for n in range(10)]
    server.faults += ["503"] * 5
    with pytest.raises(StorageError, match=r"a\.tar cannot be read: .*503.*5 attempts"):
        copy_in_sequence(f"{server.url}/a.tar", tmp_path / "copy", hurried)


def test_a_pipe_that_stands_still_is_ended(tmp_path: Path) -> None:
    hurried = Patience(attempts=2, first_wait_s=0.001, timeout_s=0.1)
    with pytest.raises(StorageError, match=r"sleep 60 cannot be read: no byte in 0\.1 s \(2 att"):
        copy_in_sequence("pipe:echo a; sleep 60", tmp_path / "copy", hurried)


def test_what_a_broken_sample_leaves_is_filled_by_the_next(tmp_path: Path) -> None:
    with writing_shards(tmp_path, "s", SAMPLES) as write:
        for number in range(SAMPLES):
            write(f"{number}", {"jpg": b"no image" if number == 3 else jpeg(number)})
    bad: list[dict[str, Any]] = []
    locations = (str(tmp_path / "s-000000.tar"),)
    reader = StreamingReader(locations, Reading(Preprocess(8), 3, on_bad=bad.append))
    found = list(islice(reader.batches(), 3))
    assert sorted(keys(found)) == [f"{number}" for number in range(SAMPLES) if number != 3]
    assert found[0].classes is None
    assert bad[0]["key"] == "3"
    strict = StreamingReader(locations, Reading(Preprocess(8), 3, max_bad_fraction=0.0))
    with pytest.raises(UserError, match=r"data\.max_bad_fraction"):
        list(islice(strict.batches(), 9))


def test_the_weaker_promise_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rank in range(2):
        batches(f"{folder}/*.tar", 0, 1, rank, 2)
    assert caplog.text.count("batches depend on the number of ranks") == 1


def test_a_spec_that_cannot_be_streamed_is_refused(folder: Path) -> None:
    for spec, message in (
        ("pipe:cat a.tar", r"data\.allow_pipe=true"),
        ({"a": {"shards": "x"}}, "cannot read a mixture"),
        ("", "names no shards"),
        (str(folder), "needs tar files"),
        (f"{folder}/none.tar", "no shard"),
        ("ftp://host/a.tar", "cannot read ftp://"),
    ):
        with pytest.raises(UserError, match=message):
            stream_locations(spec, allow_pipe=False)


@pytest.mark.parametrize("choice", ["skip", "use"])
def test_a_damaged_picture_is_left_out_or_used_and_counted(tmp_path: Path, choice: str) -> None:
    with writing_shards(tmp_path, "s", SAMPLES) as write:
        for number in range(SAMPLES):
            whole = encode("JPEG")
            write(f"{number}", {"jpg": cut(whole) if number == 3 else whole})
    told: list[dict[str, Any]] = []
    locations = (str(tmp_path / "s-000000.tar"),)
    reading = Reading(Preprocess(8), 3, on_bad=told.append, damaged=choice)
    reader = StreamingReader(locations, reading)
    found = keys(list(islice(reader.batches(), 3)))
    assert ("3" in found) == (choice == "use")
    assert told[0]["key"] == "3"
    assert told[0].get("used", False) == (choice == "use")
