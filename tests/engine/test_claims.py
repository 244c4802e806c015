import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from taming_dist.engine.claims import Claims


def foreign(folder: Path, name: str, age_s: float) -> Path:
    """A claim of a worker on another host, renewed `age_s` ago."""
    path = folder / f"{name}.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    renewed = time.time() - age_s
    os.utime(path, (renewed, renewed))
    return path


def test_only_one_worker_gets_a_piece_and_it_is_free_again_after_release(tmp_path: Path) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a")
        assert not other.take("a")
        assert other.take("b")
        one.release("a")
        assert other.take("a")
    assert list(tmp_path.iterdir()) == []


def test_what_a_silent_worker_has_left_is_taken_over(tmp_path: Path) -> None:
    foreign(tmp_path, "old", age_s=40)
    foreign(tmp_path, "fresh", age_s=5)
    with Claims(tmp_path, stale_s=30) as claims:
        assert claims.take("old")
        assert not claims.take("fresh")


def test_a_worker_of_this_host_whose_process_is_gone_is_known_to_be_dead(tmp_path: Path) -> None:
    script = (
        "import os; from taming_dist.engine.claims import Claims; "
        f"assert Claims(__import__('pathlib').Path({str(tmp_path)!r})).take('a'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (tmp_path / "a.claim").exists()
    with Claims(tmp_path, stale_s=3600) as claims:
        assert claims.take("a")


def test_a_living_worker_renews_its_claims(tmp_path: Path) -> None:
    with Claims(tmp_path, stale_s=0.6) as claims:
        assert claims.take("a")
        os.utime(tmp_path / "a.claim", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / "a.claim").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_worker_of_this_host_that_runs_is_alive_although_the_clock_has_jumped(
    tmp_path: Path,
) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a")
        os.utime(tmp_path / "a.claim", (0, 0))
        assert not other.take("a")


def test_a_claim_that_is_merely_tried_for_is_none_that_was_lost(tmp_path: Path) -> None:
    lost: list[str] = []
    with Claims(tmp_path, stale_s=0.006, lost=lost.append) as claims:
        foreign(tmp_path, "a", age_s=0)
        assert not any(claims.take("a", lambda claim: False) for _ in range(2000))
    assert lost == []


def test_a_claim_that_was_taken_over_is_left_to_its_new_owner(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        path = foreign(tmp_path, "a", age_s=0)
        claims.release("a")
        assert path.exists()


def test_a_claim_that_is_just_being_written_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "a.claim").touch()
    with Claims(tmp_path) as claims:
        assert not claims.take("a")


@pytest.mark.parametrize("call", [os.open, os.fdopen, json.dump, Path.unlink])
def test_a_worker_stopped_in_the_middle_of_taking_or_releasing_leaves_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., object]
) -> None:
    owner = {os.open: os, os.fdopen: os, json.dump: json, Path.unlink: Path}[call]

    def stopped(*given: object, **named: object) -> None:
        monkeypatch.undo()
        call(*given, **named)
        raise KeyboardInterrupt

    def work() -> None:
        with Claims(tmp_path) as claims:
            monkeypatch.setattr(owner, call.__name__, stopped)
            claims.take("a")
            claims.release("a")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_worker_leaves_the_claims_of_others(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        path = foreign(tmp_path, "a", age_s=0)
    assert path.exists()
