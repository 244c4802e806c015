"""Every end of a run is told: in events.jsonl, in the rank's log and on the terminal."""

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from taming_dist import cli
from taming_dist.engine.world import World, is_lost_connection
from taming_dist.errors import Diverged, LostRank, UserError
from taming_dist.training.clock import Clock
from taming_dist.training.ending import ending

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
CLOCK = Clock(global_batch=4, total_steps=10, images=12)


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


@pytest.fixture(autouse=True)
def announced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is announced, as if by the only rank of this node."""
    said: list[str] = []
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "announce", lambda line, detail="": said.append(line + detail))
    monkeypatch.setattr(cli, "announced", lambda: bool(said))
    yield said
    signal.signal(signal.SIGTERM, handler)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def end(folder: Path, rank: int, size: int, error: BaseException) -> BaseException:
    """What `ending` makes of an error."""
    with pytest.raises(BaseException) as ended, ending(folder, world(rank, size), CLOCK):  # noqa: PT011
        raise error
    return ended.value


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (UserError("no file a"), "no file a", 2),
        (PermissionError(13, "Permission denied", "a"), None, 2),
        (Diverged("step 3: train/loss not finite"), "step 3: train/loss not finite", 1),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error", 1),
        (ValueError("a bug"), "ValueError: a bug", 1),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_of_several_ranks_is_one_line_an_event_and_in_its_log(
    tmp_path: Path, announced: list[str], error: Exception, reason: str, code: int, rank: int
) -> None:
    ended = end(tmp_path, rank, 2, error)
    assert isinstance(ended, SystemExit)
    assert ended.code == code
    (line,) = announced
    log = tmp_path / "logs" / f"rank-{rank}.log"
    expected = isinstance(error, (UserError, Diverged, PermissionError))
    assert line.endswith(f" (traceback in {log})") != expected
    assert (reason or "no permission for a") in line
    assert str(error) in log.read_text()
    assert ("Traceback" in log.read_text()) != isinstance(error, (UserError, Diverged))
    told = [(event["event"], event["step"], event.get("rank")) for event in events(tmp_path)]
    common = isinstance(error, Diverged)
    others = [] if common else [("error", 3, 1)]  # all ranks diverge, and the first says so
    assert told == ([("exit", 3, None)] if rank == 0 else others)
    assert all(reason in (None, event["reason"]) for event in events(tmp_path))


def test_a_bug_of_a_single_process_keeps_its_traceback(tmp_path: Path) -> None:
    error = ValueError("a bug")
    assert end(tmp_path, 0, 1, error) is error
    (event,) = events(tmp_path)
    assert event["event"] == "exit"
    assert (event["finished"], event["reason"]) == (False, "ValueError: a bug")


def test_a_rank_that_lost_another_does_not_bury_the_others_error(
    tmp_path: Path, announced: list[str]
) -> None:
    end(tmp_path, 1, 2, UserError("no file a"))
    lost = LostRank("another rank has ended")
    lost.__cause__ = RuntimeError(GLOO)
    ended = end(tmp_path, 0, 2, lost)
    assert isinstance(ended, SystemExit)
    assert ended.code == 1
    assert announced == ["no file a"]
    assert [event["event"] for event in events(tmp_path)] == ["error", "exit"]
    assert events(tmp_path)[1]["reason"].startswith("another rank has ended")
    assert "pair.cc" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_a_rank_that_lost_one_which_said_nothing_says_so(
    tmp_path: Path, announced: list[str]
) -> None:
    end(tmp_path, 1, 2, LostRank("another rank has ended"))
    assert announced == ["another rank has ended"]
    assert events(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (dist.DistBackendError("ncclRemoteError: a remote process exiting prematurely"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error: unhandled cuda error"), False),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ConnectionError("a web server"), False),
    ],
)
def test_the_loss_of_a_rank_is_told_from_errors_of_ones_own(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) is lost


def test_a_rank_that_ends_is_not_ended_by_its_launcher(tmp_path: Path) -> None:
    end(tmp_path, 1, 2, UserError("no file a"))
    os.kill(os.getpid(), signal.SIGTERM)  # of which this process would die


def test_an_error_is_told_before_what_was_opened_is_closed(
    tmp_path: Path, announced: list[str]
) -> None:
    order: list[Any] = []

    @contextmanager
    def slow() -> Iterator[None]:
        try:
            yield
        finally:
            order.append((list(announced), len(events(tmp_path))))

    with suppress(SystemExit), ending(tmp_path, world(0, 1), CLOCK) as opened:
        opened.enter_context(slow())
        raise UserError("no file a")
    assert order == [(["no file a"], 1)]


def test_an_error_is_told_where_the_disk_is_full(
    tmp_path: Path, announced: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("events.jsonl", "logs/rank-0.log"):
        (tmp_path / name).symlink_to("/dev/full")
    end(tmp_path, 0, 1, UserError("no space left"))
    assert announced == ["no space left"]
    assert capsys.readouterr().err == ""


def test_the_handlers_of_a_run_end_with_it(tmp_path: Path) -> None:
    before = list(logging.getLogger("taming_dist").handlers)
    with ending(tmp_path, world(0, 1), CLOCK):
        logging.getLogger("taming_dist.data").warning("a thing")
    assert logging.getLogger("taming_dist").handlers == before
    assert events(tmp_path) == []
