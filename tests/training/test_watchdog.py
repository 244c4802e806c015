"""Runs that hang end with a line that names the rank: real processes and signals."""

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from taming_dist.cli import EXIT_AGAIN
from taming_dist.engine.peers import Peer, Peers
from taming_dist.engine.world import World
from taming_dist.processes import Process, birth_of, state_of, this_process
from taming_dist.training import watchdog
from taming_dist.training.clock import Clock
from taming_dist.training.signals import StopRequest
from taming_dist.training.watchdog import Progress, watching

WORKER = Path(__file__).with_name("watchdog_worker.py")
STUCK = str(EXIT_AGAIN)
CLOCK = Clock(global_batch=4, total_steps=10, images=12)
ALONE = World(0, 1, 0, torch.device("cpu"))


def errors(folder: Path) -> list[str]:
    """The error lines of both ranks: whichever is there first tells what all have to say."""
    lines = [line for n in range(2) for line in (folder / f"{n}.out").read_text().splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def log(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text()


def reasons(folder: Path) -> list[str]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


def wait_for_nothing() -> None:
    time.sleep(100)


def test_a_single_rank_that_makes_no_progress_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    process = os.fork()
    if process == 0:
        sys.stderr = open(tmp_path / "err", "w")  # noqa: SIM115
        with watching(tmp_path, ALONE, CLOCK, 0.5, StopRequest()) as progress:
            progress.steps = 1
            progress.begin("waiting for data")
            wait_for_nothing()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_AGAIN
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert line.startswith(f"error: rank 0 (process {process} on ")
    assert "s (train.stuck_after) at step 4, waiting for data" in line
    assert "in wait_for_nothing" in log(tmp_path)
    assert "in _watch" in log(tmp_path), "every thread's"
    (reason,) = reasons(tmp_path)
    assert line.startswith(f"error: {reason}")


class Dog:
    """The watchdog's thread, as a test sees it: how often it has looked, and whether it would end
    the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked, self.barked = threading.Semaphore(0), threading.Event()
        armed = {"dump_traceback_later": lambda *given, **named: self.looked.release()}
        monkeypatch.setattr(watchdog, "faulthandler", SimpleNamespace(**vars(faulthandler) | armed))
        monkeypatch.setattr(watchdog.Watchdog, "_end", lambda dog, line: self.barked.set())
        monkeypatch.setattr(watchdog, "PERIOD_S", 0.01)

    def has_looked(self) -> None:
        for _ in range(3):
            assert self.looked.acquire(timeout=60)


def test_the_first_step_may_take_longer_and_each_batch_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    dog = Dog(monkeypatch)
    with watching(tmp_path, ALONE, CLOCK, 1000, StopRequest()) as progress:
        progress.since -= 2500
        dog.has_looked()
        progress.begin("in the step")
        progress.steps = 1
        for _ in progress.each("validating", range(3)):
            progress.since -= 900
        dog.has_looked()
        assert not dog.barked.is_set()
        progress.since -= 1100
        assert dog.barked.wait(timeout=60)


def test_a_process_that_was_stopped_itself_for_long_looks_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    dog = Dog(monkeypatch)
    monkeypatch.setattr(watchdog, "PERIOD_S", -1.0)  # whatever passes is longer than ten of them
    told = Progress()
    told.since -= 1e6
    monkeypatch.setattr(watchdog, "Progress", lambda: told)  # before the dog first looks
    with watching(tmp_path, ALONE, CLOCK, 1000, StopRequest()):
        dog.has_looked()
        assert not dog.barked.is_set()


def test_what_a_rank_does_is_told_without_waiting_for_anything() -> None:
    progress = Progress()
    before = progress.since
    progress.begin("in the step")
    assert progress.doing == "in the step"
    assert progress.since >= before


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    me = this_process()
    assert Peer(0, me).state in ("R", "S")
    assert Peer(1, replace(me, birth="0")).state == ""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    peer = Peer(1, replace(me, pid=child.pid, birth=birth_of(child.pid)))
    assert peer.state != ""
    child.communicate()
    assert peer.state == ""


def test_ranks_of_another_container_are_not_taken_for_dead() -> None:
    me = this_process()
    unseen = Peer(1, Process(me.host, 2**30, "5"))
    assert Peers([Peer(0, me), unseen], 0).suspect() is None


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    subprocess.run([sys.executable, str(WORKER), str(folder)], check=True, timeout=300)
    return folder


# scenario, codes of both ranks, who is named, and by which words
ENDS = [
    ("killed", "1 -9", 1, "has ended: see what the launcher says"),
    ("killed-unnoticed", f"{STUCK} -9", 1, "has ended"),
    ("stopped", f"{STUCK} -9", 1, "is stopped: no progress for 4 s (train.stuck_after)"),
    ("reading", f"{STUCK} {STUCK}", 1, "is stuck: no progress for 4 s (train.stuck_after)"),
    ("far-killed", "1 -9", 1, "has not answered for"),
    ("far-killed-unnoticed", f"{STUCK} -9", 1, "has not answered for"),
    ("far-store-killed", f"-9 {STUCK}", 0, "has ended, or its host"),
    ("far-store-stopped", f"-9 {STUCK}", 0, "does not answer: no progress for"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "codes", "rank", "words"), ENDS)
def test_a_rank_that_is_lost_or_stuck_is_named_in_one_line_with_its_host(
    found: Path, scenario: str, codes: str, rank: int, words: str
) -> None:
    folder = found / scenario
    assert (folder / "codes").read_text() == codes
    (line,) = errors(folder)
    host = this_process().host if not scenario.startswith("far") else "ab"[rank]
    assert f"rank {rank} (process " in line
    assert f" on {host}) {words}" in line
    survivor = 1 - rank
    assert all(reason in line for reason in reasons(folder))
    if codes.split()[survivor] == STUCK:
        assert "most recent call first" in log(folder, survivor)


@pytest.mark.slow
def test_a_process_that_is_stopped_while_it_reads_is_named_and_killed(found: Path) -> None:
    child = (found / "reading" / "child").read_text()
    (line,) = errors(found / "reading")
    assert f"waiting for data, where its process {child} is stopped" in line
    assert not state_of(int(child))
    assert log(found / "reading", 0).count("most recent call first") > 1, "of all ranks"


@pytest.mark.slow
def test_ranks_that_wait_for_data_leave_it_together_once_one_is_asked_to_stop(found: Path) -> None:
    assert (found / "left" / "codes").read_text() == "0 0"
    assert not (found / "left" / "events.jsonl").exists()


@pytest.mark.slow
def test_a_rank_that_waits_for_data_alone_ends_the_run_with_a_line_once_asked_to_stop(
    found: Path,
) -> None:
    folder = found / "left-alone"
    assert (folder / "codes").read_text().split()[1] == STUCK
    (line,) = errors(folder)
    assert "rank 1 (process " in line
    assert "was asked to stop at step 1, waiting for data (" in line
    assert "which other ranks do not wait for: nothing was saved" in line
    assert reasons(folder)[0] in line


@pytest.mark.slow
def test_a_rank_with_an_error_of_its_own_is_heard_and_no_other(found: Path) -> None:
    folder = found / "failed-unnoticed"
    assert (folder / "codes").read_text() == f"{STUCK} 2"
    lines = [line for n in range(2) for line in (folder / f"{n}.out").read_text().splitlines()]
    assert lines == ["error: rank 1: no file a"]


@pytest.mark.slow
def test_ranks_that_finish_one_after_the_other_are_not_lost(found: Path) -> None:
    assert (found / "fine" / "codes").read_text() == "0 0"
    assert not (found / "fine" / "events.jsonl").exists()
