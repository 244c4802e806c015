"""What the script that started a run reads of its end."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taming_dist import cli
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.outcome import VARIABLE, forget_outcome, write_outcome
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.training.clock import Clock
from taming_dist.training.ending import ending
from taming_dist.training.saving import Job, Saver
from taming_dist.training.sinks import Sinks
from taming_dist.training.watchdog import Progress

CLOCK = Clock(global_batch=4, total_steps=10, images=12)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "end.json"))
    return tmp_path / "end.json"


def test_the_file_that_the_environment_names_gets_one_line(file: Path) -> None:
    forget_outcome()
    write_outcome(3, 12, finished=True, reason="no better val/nll:\nbest 3 at step 2")
    (line,) = file.read_text().splitlines()
    reason = "no better val/nll: best 3 at step 2"
    assert json.loads(line) == {"finished": True, "step": 3, "images": 12, "reason": reason}
    assert [path.name for path in file.parent.iterdir()] == ["end.json"]


def test_nothing_is_written_unless_the_environment_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    forget_outcome()
    write_outcome(3, 12, finished=True, reason="finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_first_rank_is_an_end_as_well(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(cli, "announce", lambda line, detail="": None)
    monkeypatch.setattr("taming_dist.training.ending.outlast_the_launcher", lambda: None)
    world = World(rank, 2, rank, torch.device("cpu"))
    with pytest.raises(SystemExit), ending(tmp_path, world, CLOCK):
        raise UserError("no file a")
    assert file.exists() == (rank == 0)
    if rank == 0:
        found = json.loads(file.read_text())
        assert (found["finished"], found["reason"]) == (False, "no file a")


def test_a_new_start_forgets_the_last_one(file: Path) -> None:
    file.write_text("{}\n")
    forget_outcome()
    assert not file.exists()


def test_a_place_that_cannot_be_written_is_known_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere" / "end.json"))
    with pytest.raises(UserError, match=f"^{VARIABLE}=.*nowhere/end.json"):
        forget_outcome()


def test_a_place_that_is_gone_at_the_end_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone" / "end.json"))
    with caplog.at_level(logging.WARNING):
        write_outcome(3, 12, finished=True, reason="finished")
    assert "cannot be written" in caplog.text


def test_a_run_that_is_killed_leaves_how_far_it_has_saved(file: Path, tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", world, keep_last=1, keep_every=0)
    saver = Saver(checkpoints, tmp_path / "export", Sinks(None, []), Progress(), world)
    draft: Any = SimpleNamespace(final=tmp_path / "checkpoints" / "images-000000000012")
    saver._job = Job(draft, CLOCK, 0.0, lambda draft, given_up: None)
    saver._job.wait(60)
    saver.tell()
    found = json.loads(file.read_text())
    assert found == {
        "finished": False,
        "step": 3,
        "images": 12,
        "reason": "saved images-000000000012",
    }
