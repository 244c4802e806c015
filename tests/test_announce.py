"""Lines that ranks have in common, said by real processes that know of each other by files only."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taming_dist import announce

SAY = """
import sys
from taming_dist import announce
announce.WAIT_S = float(sys.argv[2])
announce.announce(sys.argv[1])
"""
SHELL = ["sh", "-c", '"$@"; exit $?', "sh"]
Speak = Callable[..., list[str]]


@pytest.fixture
def speak(tmp_path: Path) -> Iterator[Speak]:
    """Start a rank per message and give the lines of all; None is a rank that says nothing."""
    processes: list[subprocess.Popen] = []

    def call(
        *messages: str | None,
        port: str = "1",
        wait: float = 60,
        parents: bool = False,
        **variables: str,
    ) -> list[str]:
        started = [
            subprocess.Popen(
                [*(SHELL if parents else []), sys.executable, "-c", SAY, message, str(wait)],
                env=os.environ
                | {"WORLD_SIZE": str(len(messages)), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TMPDIR": str(tmp_path)}
                | variables,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, message in enumerate(messages)
            if message is not None
        ]
        processes.extend(started)
        return sorted(
            line for process in started for line in process.communicate(timeout=60)[1].splitlines()
        )

    yield call
    for process in processes:
        process.kill()
        process.wait()


def test_what_all_ranks_have_to_say_is_said_once_and_without_a_number(speak: Speak) -> None:
    assert speak(*["there is no\nkey data.sise"] * 8) == ["error: there is no key data.sise"]


def test_what_some_ranks_have_to_say_is_said_once_with_the_number_of_one(speak: Speak) -> None:
    messages = ("the disk is full", None, "no file b", "the disk is full")
    lines = set(speak(*messages, wait=0.5))
    shared = {"error: rank 0: the disk is full", "error: rank 3: the disk is full"}
    assert len(lines) == 2
    assert lines - shared == {"error: rank 2: no file b"}


def test_the_next_launch_says_it_again(speak: Speak) -> None:
    """Also one that torchrun makes of the same ranks, after a failure."""
    said = [
        speak("no file a", "no file a", port=port, TORCHELASTIC_RESTART_COUNT=restart)
        for port, restart in (("1", "0"), ("2", "0"), ("2", "1"))
    ]
    assert said == [["error: no file a"]] * 3


def test_tasks_of_slurm_agree_though_each_has_a_parent_of_its_own(speak: Speak) -> None:
    """Training gives them variables of torchrun too, which is not their launcher."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    assert speak("no file a", "no file a", parents=True, **step) == ["error: no file a"]


def test_a_single_process_says_it_as_it_is_and_leaves_no_file(speak: Speak, tmp_path: Path) -> None:
    assert speak("no file a", port="1") == ["error: no file a"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rank_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is the second of two ranks; gives the folder of their files, not yet there."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(announce, "WAIT_S", 0.0)
    return tmp_path / f"taming_dist-{os.getuid()}"


def test_where_no_files_can_be_made_every_rank_speaks(
    rank_one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank_one.write_text("not a folder")
    announce.announce("no file a", " (own)")
    assert capsys.readouterr().err == "error: rank 1: no file a (own)\n"
    assert not announce.announced()


def test_whether_anything_was_announced_is_known(rank_one: Path) -> None:
    assert not announce.announced()
    announce.announce("no file a")
    assert announce.announced()


def test_a_line_that_another_rank_says_is_not_said_again(
    rank_one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        announce.announce("no file a", f" (the traceback is in rank-{rank}.log)")
    expected = "error: rank 1: no file a (the traceback is in rank-1.log)\n"
    assert capsys.readouterr().err == expected


def test_files_of_old_launches_are_removed(rank_one: Path) -> None:
    rank_one.mkdir()
    old, new = rank_one / "old.said", rank_one / "new.said"
    for file in (old, new):
        file.touch()
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    announce.announce("no file a")
    assert not old.exists()
    assert new.exists()


def test_a_link_in_the_place_of_the_folder_is_not_followed(
    rank_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    old = elsewhere / "thesis.tex"
    old.touch()
    os.utime(old, (0, 0))
    rank_one.symlink_to(elsewhere)
    announce.announce("no file a")
    assert capsys.readouterr().err == "error: rank 1: no file a\n"
    assert list(elsewhere.iterdir()) == [old]
