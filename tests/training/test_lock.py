"""Two runs in one folder: the second is refused, unless the first is dead."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from taming_dist.engine.claims import Claims
from taming_dist.errors import UserError
from taming_dist.processes import this_process
from taming_dist.training import lock
from taming_dist.training.lock import locked

HOLD = """
import sys
from pathlib import Path
from taming_dist.training.lock import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    input()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def foreign(folder: Path, age_s: float) -> Path:
    """A claim of a run on another host that was renewed `age_s` ago."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "noon"}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_second_run_of_a_folder_is_refused_in_a_line_and_touches_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    with holder(run_dir) as other:
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        with pytest.raises(UserError) as refused, locked(run_dir):
            pass
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    host = this_process().host
    said = str(refused.value)
    assert said.startswith(f"run.dir={run_dir} is in use by process {other.pid} on {host}, since ")
    assert said.endswith("or choose another run.name")
    assert "\n" not in said


def test_a_run_that_was_killed_does_not_keep_its_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.kill()
        other.wait()
        assert (tmp_path / "run.claim").exists()
        with locked(tmp_path):
            claim = json.loads((tmp_path / "run.claim").read_text())
            assert claim["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_with_the_number_of_a_dead_run_does_not_keep_its_folder(
    tmp_path: Path,
) -> None:
    here = this_process()
    *realm, ticks = here.birth.split(" ")
    dead = dataclasses.replace(here, birth=" ".join([*realm, str(int(ticks) - 1)]))
    (tmp_path / "run.claim").write_text(json.dumps(dataclasses.asdict(dead)))
    with locked(tmp_path):
        pass


def test_a_folder_is_free_again_after_the_run_and_gone_if_it_stayed_empty(tmp_path: Path) -> None:
    for name, files in (("empty", []), ("used", ["config.yaml"])):
        with locked(tmp_path / name):
            for file in files:
                (tmp_path / name / file).touch()
    assert not (tmp_path / "empty").exists()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["config.yaml"]


def test_a_run_on_another_host_that_is_no_longer_renewed_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LOOK_AGAIN_S", 0.02)
    foreign(tmp_path, age_s=1)
    with locked(tmp_path, stale_s=0.3):
        pass
    assert "was left by a run on elsewhere: waiting" in capsys.readouterr().out


def test_a_run_on_another_host_that_renews_its_claim_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign(tmp_path, age_s=1)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path))  # meanwhile, there
    refused = pytest.raises(UserError, match="by process 7 on elsewhere, since noon")
    with refused, locked(tmp_path, stale_s=60):
        pass
    assert path.exists()


def test_the_clock_of_this_host_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign(tmp_path, age_s=1)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path))
    with pytest.raises(UserError, match="in use"), locked(tmp_path, stale_s=60):
        pass


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_host_whose_clock_is_hours_off_is_neither_taken_for_dead_nor_waited_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """As on file systems that take the time of a file from the host that writes it."""
    path, then = foreign(tmp_path, age_s=3600 * hours), time.time() - 3600 * hours
    monkeypatch.setattr(lock, "LOOK_AGAIN_S", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", lambda _: os.utime(path, (then + 20, then + 20)))
        with pytest.raises(UserError, match="in use"), locked(tmp_path, stale_s=60):
            pass
    with locked(tmp_path, stale_s=0.3):  # now it is renewed no more
        pass


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_job_that_slurm_has_started_again_waits_for_its_former_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    owner = dataclasses.asdict(this_process()) if host == "here" else {"host": host, "pid": 7}
    path = tmp_path / "run.claim"
    path.write_text(json.dumps(owner | {"since": "noon", "job": "12"}))
    looks = []

    def former_ends(_: float) -> None:
        looks.append(host)
        os.utime(path)
        if len(looks) == 3:
            path.unlink()

    monkeypatch.setattr(lock.time, "sleep", former_ends)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass
    looks.clear()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path):
        assert json.loads(path.read_text())["job"] == "12"
    assert len(looks) == 3


def test_a_run_that_finds_its_folder_taken_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was stopped for minutes, say, and a run on another host took it for dead."""
    ended = threading.Event()
    monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
    with locked(tmp_path, stale_s=0.3):
        foreign(tmp_path, age_s=0)
        assert ended.wait(60)
    assert "was taken over by another run" in capsys.readouterr().err
    assert (tmp_path / "run.claim").exists()  # the other's


def test_of_two_that_find_an_abandoned_claim_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one has looked before the faster one took it, and must not remove that."""
    foreign(tmp_path, age_s=90)
    with Claims(tmp_path, 60) as fast, Claims(tmp_path, 60) as slow:
        slow.worker = "another"
        found = slow._is_abandoned

        def late(claim: Any) -> bool:
            abandoned = found(claim)
            assert fast.take("run")
            return abandoned

        monkeypatch.setattr(slow, "_is_abandoned", late)
        assert not slow.take("run")
        assert json.loads((tmp_path / "run.claim").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
