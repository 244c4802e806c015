"""What has bitten users of stock webdataset pipelines on the way of bytes, and cannot happen here.

The numbers are those of docs/reading.md; the others are in test_footguns.py.
"""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webdataset as wds

from taming_dist.data import streaming
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.data.streaming import StreamingReader, stream_locations
from taming_dist.errors import UserError
from taming_dist.formats import sources
from taming_dist.formats.manifest import resolve
from taming_dist.formats.shards import scan, walk
from taming_dist.formats.storage import StorageError
from tests.data.pictures import jpeg
from tests.data.shard_files import writing_shards

SAMPLES = 20


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waits, and without the shuffle buffer, which holds several passes."""
    clock = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    monkeypatch.setattr(sources, "time", clock)
    monkeypatch.setattr(streaming, "SHUFFLED", 1)


Damage = Callable[[bytes, int], bytes]


def write(folder: Path, first: int = 0) -> Path:
    """One shard of 20 samples, class ids from `first`; gives the shard."""
    with writing_shards(folder, "s", SAMPLES) as write:
        for number in range(first, first + SAMPLES):
            write(f"{number:04d}", {"jpg": jpeg(number), "cls": b"%d" % number})
    return folder / "s-000000.tar"


def indexed(spec: Any) -> Reader:
    return Reader(resolve(spec), Reading(Preprocess(8), micro_batch=4), lanes=4, block=4)


def streamed(spec: Any) -> StreamingReader:
    locations = stream_locations(spec, allow_pipe=True)
    return StreamingReader(locations, Reading(Preprocess(8), micro_batch=4))


def keys(reader: Reader) -> list[str]:
    return [key for batch in reader.epoch_batches() for key in batch.keys]


DAMAGES: dict[str, Damage] = {
    "cut between two samples": lambda data, at: data[:at],
    "cut inside a header": lambda data, at: data[: at + 100],
    "cut inside an image": lambda data, at: data[: at + 600],
    "a header of zeros": lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
    "a damaged header": lambda data, at: data[: at + 100] + b"xx" + data[at + 102 :],
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_8_and_9_a_cut_or_damaged_tar_never_ends_a_shard_or_a_sample_in_silence(
    kind: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    whole, middle = path.read_bytes(), int(scan(path)[1][15])
    path.write_bytes(DAMAGES[kind](whole, middle))
    assert sum(1 for _ in stock(path)) < SAMPLES  # the trap is there
    with pytest.raises(UserError, match=r"s-000000\.tar"):
        scan(path)
    with pytest.raises(UserError, match=r"s-000000\.tar"):
        next(streamed(str(path)).batches())
    if len(path.read_bytes()) < len(whole):
        with pytest.raises(UserError, match=r"s-000000\.tar has .* its manifest says"):
            indexed(str(tmp_path))
    else:
        bad: list[Any] = []
        reader = Reader(resolve(str(tmp_path)), Reading(Preprocess(8), 4, on_bad=bad.append))
        assert keys(reader) == [f"{number:04d}" for number in range(SAMPLES) if number != 15]
        assert len(bad) == 1


def stock(path: Path) -> Any:
    return wds.WebDataset(str(path), shardshuffle=False, handler=wds.ignore_and_continue)


def test_9_a_sample_without_its_class_is_no_sample(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    classes = [member for member in walk(memoryview(data)) if member.name.endswith(".cls")]
    data[classes[3].header + 1] ^= 1
    path.write_bytes(data)
    bad: list[Any] = []
    reader = Reader(resolve(str(tmp_path)), Reading(Preprocess(8), 4, on_bad=bad.append))
    assert "0003" not in keys(reader)
    assert "checksum" in bad[0]["error"]


@pytest.mark.parametrize(
    "command", ["head -c 3000 {} | cat", "cat {0}-none | cat", "cat {}; exit 3", "cat {} | false"]
)
def test_10_a_pipe_that_fails_anywhere_is_an_error(command: str, tmp_path: Path) -> None:
    command = command.format(write(tmp_path))
    with pytest.raises(UserError, match=r"pipe:.*(damaged|the command ends with [13])"):
        next(streamed(f"pipe:{command}").batches())


def test_11_a_shard_that_cannot_be_had_ends_the_run_and_is_not_skipped(server: Any) -> None:
    write(server.folder / "a")
    url = f"{server.url}/a"
    reader = indexed(url)
    server.faults += ["503"] * 10**4
    with pytest.raises(StorageError, match="/a/s-000000.tar.*503"):
        keys(reader)


def test_12_shards_of_one_name_are_not_taken_for_each_other(server: Any) -> None:
    for number, name in enumerate("abc"):
        write(server.folder / name, 100 * number)
    urls = [f"{server.url}/{name}/s-000000.tar" for name in "abc"]
    expected = [f"{100 * part + number:04d}" for part in range(3) for number in range(SAMPLES)]
    assert keys(indexed(urls)) == expected
    found = islice(streamed(urls).batches(), 15)
    assert sorted(key for batch in found for key in batch.keys) == expected
