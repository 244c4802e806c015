import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taming_dist.data.images import Preprocess, RandomCrop
from taming_dist.data.reader import Reader
from taming_dist.data.worker import LENT, WorkerDied
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from taming_dist.launch import STOP_SIGNALS
from tests.data.readers import reader_of

Write = Callable[..., Path]
Inline = Callable[..., list]


def reader(folder: Path, **options: Any) -> Reader:
    defaults = {"seed": 5, "lanes": 8, "block": 4, "micro_batch": 8}
    preprocess = Preprocess(6, RandomCrop(), flip=True)
    return reader_of(resolve(str(folder)), preprocess, **(defaults | options))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_images: Write) -> Path:
    return write_images(tmp_path_factory.mktemp("shards"), cls=lambda n: b"%d" % n)


def state_of(process: int) -> tuple[str, int]:
    """State letter and parent of a process; Z if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])


def workers(parent: int) -> list[int]:
    """The decoding processes of a process that are alive."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        process = int(command.parent.name)
        if state_of(process)[0] != "Z" and state_of(process)[1] == parent:
            found += [process] if b"worker import main" in command.read_bytes() else []
    return found


def wait_for_end(process: int) -> None:
    deadline = time.monotonic() + 12
    while state_of(process)[0] != "Z":
        assert time.monotonic() < deadline, f"{process} is still there"
        time.sleep(0.05)


@pytest.mark.parametrize(("world_size", "threads"), [(1, 3), (2, 1)])
def test_the_process_gives_what_its_code_gives_in_this_one(
    shards: Path, train_inline: Inline, world_size: int, threads: int
) -> None:
    rows = [rows for _, rows in train_inline(reader(shards), 16, 14)]
    expected = np.concatenate([part.ids for part in rows])
    pixels = np.concatenate([part.columns["image"] for part in rows])
    place = {"world_size": world_size, "rank": world_size - 1, "threads": threads}
    source = reader(shards, micro_batch=8 // world_size, **place)
    # All are kept: a batch must not change when the memory that it came in is used again.
    batches = list(islice(source.batches(16), 14))
    last = slice(world_size - 1, None, world_size)
    assert torch.cat([batch.ids for batch in batches]).tolist() == expected[last].tolist()
    assert [int(k) for batch in batches for k in batch.keys] == expected[last].tolist()
    assert all(b.classes is not None and b.classes.equal(b.ids) for b in batches)
    images = torch.cat([batch.columns["image"] for batch in batches]).permute(0, 2, 3, 1)
    assert np.array_equal(images.numpy(), pixels[last])


def test_signals_that_the_trainer_answers_do_not_end_the_worker(shards: Path) -> None:
    batches = reader(shards).batches()
    for number in STOP_SIGNALS:  # the first perhaps before its first line
        while not workers(os.getpid()):
            next(batches)
        os.kill(workers(os.getpid())[0], number)
        assert len(next(batches)) == 8


def test_a_killed_worker_is_an_error_and_no_hang(shards: Path) -> None:
    batches = reader(shards).batches()
    next(batches)
    os.kill(workers(os.getpid())[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="code -9"):
        list(islice(batches, 20))


def test_the_worker_ends_when_the_iterator_is_closed_or_dropped(shards: Path) -> None:
    closed, dropped = reader(shards).batches(), reader(shards).batches()
    next(closed)
    next(dropped)
    assert len(workers(os.getpid())) == 2
    closed.close()  # type: ignore[attr-defined]
    del dropped
    gc.collect()
    assert workers(os.getpid()) == []


TRAINER = """
import os, sys, time
from taming_dist.data.decoding import Decoder
from taming_dist.data.images import Preprocess
from taming_dist.data.plan import Plan
from taming_dist.formats.manifest import resolve
from taming_dist.data.worker import decode_in_process
dataset = resolve(sys.argv[1])
plan = Plan(dataset.samples_per_shard, dataset.fingerprint, 0, 8, 4, 0, 1, 8)
decoder = Decoder(dataset, plan, Preprocess(6), ("image",), None)
batches = decode_in_process(decoder, 0, 2, lambda filled, rows: filled.keys)
next(batches)
assert "torch" not in sys.modules  # which would make the worker slow to start
{}
print("reading", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("otherwise", ["", "os.fork() or time.sleep(15) or os._exit(0)"])
def test_the_worker_and_its_memory_go_when_the_trainer_is_killed(
    shards: Path, otherwise: str
) -> None:
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", TRAINER.format(otherwise), str(shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"reading\n"
        found = workers(trainer.pid)
        trainer.kill()
    assert len(found) == 1
    wait_for_end(found[0])
    assert set(os.listdir("/dev/shm")) <= before


def test_a_worker_that_is_stopped_goes_with_the_trainer(shards: Path) -> None:
    command = [sys.executable, "-c", TRAINER.format(""), str(shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"reading\n"
        (worker,) = workers(trainer.pid)
        os.kill(worker, signal.SIGSTOP)
        trainer.kill()
    wait_for_end(worker)


def test_the_worker_goes_when_the_trainer_fails(shards: Path) -> None:
    failing = TRAINER.format("1 / 0")
    command = [sys.executable, "-c", failing, str(shards)]
    # Comes back when nobody holds the other end of stderr any more, the worker neither.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "ZeroDivisionError" in done.stderr
    assert done.returncode == 1


def test_bad_samples_are_told_in_order_and_too_many_end_the_run(
    tmp_path: Path, write_images: Write, train_inline: Inline
) -> None:
    path = write_images(tmp_path, bad=(3, 24, 89))
    records: list[dict[str, Any]] = []
    source = reader(path, threads=4, on_bad=records.append, max_bad_fraction=1.0)
    list(islice(source.batches(), 11))
    expected = [record for filled, _ in train_inline(reader(path), 0, 11) for record in filled.bad]
    assert records == expected
    assert source.num_bad == len(records) == 3
    assert source.num_read == 88
    strict = reader(path)
    with pytest.raises(UserError, match=r"2 of \d+ samples .*data\.max_bad_fraction"):
        list(islice(strict.batches(), 22))


def test_a_mistake_of_the_user_arrives_as_it_is_and_a_bug_with_its_place(
    tmp_path: Path, write_images: Write
) -> None:
    source = reader(write_images(tmp_path))
    (tmp_path / "train-000002.tar.idx").write_bytes(b"")
    with pytest.raises(UserError, match=r"000002\.tar\.idx does not match"):
        list(islice(source.batches(), 11))
    source.decoder = dataclasses.replace(source.decoder, read_class=int)
    with pytest.raises(RuntimeError, match=r"decoding\.py(.|\n)*int\(\) argument must be"):
        next(source.batches())
    assert workers(os.getpid()) == []


def test_batches_come_without_a_copy_and_their_memory_is_used_again_once_they_are_dropped(
    shards: Path,
) -> None:
    places = [batch.columns["image"].data_ptr() for batch in islice(reader(shards).batches(), 40)]
    assert len(set(places)) <= 2 + 2 + LENT  # threads, two batches ahead, and those lent
    kept = list(islice(reader(shards).batches(), 40))
    assert len({batch.columns["image"].data_ptr() for batch in kept}) == 40
