"""Whatever happens to the ranks, the files are those of an undisturbed run, byte for byte."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from taming_dist.engine.stopping import Stopped
from taming_dist.engine.workers import Worker
from taming_dist.errors import UserError
from taming_dist.sampling.units import Unit
from taming_dist.sampling.work import Work
from tests.sampling.conftest import Sample

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def command(exports: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command on so many ranks."""

    def start(ranks: int, out: str, *given: str) -> subprocess.Popen[str]:
        module = ["-m", "taming_dist.sample", f"transformer={exports}/class"]
        words = [*module, f"vqgan={exports}/vqgan", f"out={tmp_path / out}", *given]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        return subprocess.Popen(
            [sys.executable, *(launcher if ranks > 1 else []), *words],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def until_some_units_are_finished(out: Path, started: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while len(list(out.glob(".units/*[0-9].json"))) < 3:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_begin_at_shares_of_their_own_and_make_what_others_have_left(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(sample("alone"))
    make, made = Work._make, []

    def stopping(work: Work, unit: Unit) -> None:
        if len(made) in (1, 3):  # each of the first two ranks is stopped once
            made.append(None)
            raise Stopped("SIGTERM")
        make(work, unit)
        made.append(unit.number)

    monkeypatch.setattr(Work, "_make", stopping)
    for number in (2, 1, 0):
        worker = Worker(number, 3, 0)
        monkeypatch.setattr("taming_dist.sample.environment_worker", lambda who=worker: who)
        sample("shared")
    assert made == [2, None, 1, None, 0, 3]
    assert contents(tmp_path / "shared") == expected


@pytest.mark.slow
@pytest.mark.parametrize(("format", "ranks"), [("png", 1), ("npz", 3), ("shards", 2)])
def test_after_a_rank_was_killed_any_number_of_ranks_makes_the_rest(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path, format: str, ranks: int
) -> None:
    given = ("n=120", "batch=2", "seed=3", f"format={format}")
    undisturbed = command(1, "undisturbed", *given)
    assert undisturbed.wait(300) == 0, undisturbed.communicate()
    killed = command(2, "out", *given)
    until_some_units_are_finished(tmp_path / "out", killed)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    victim = next(
        int(child)
        for child in children
        if b"taming_dist.sample" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    assert killed.wait(120) != 0
    assert not (tmp_path / "out" / "samples.json").exists()
    again = command(ranks, "out", *given)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_stop_a_run_says_so_and_continues_later(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    started = command(1, "out", "n=400", "batch=2")
    until_some_units_are_finished(tmp_path / "out", started)
    started.send_signal(number)
    text, _ = started.communicate(timeout=60)
    assert started.returncode == 0, text
    last = text.splitlines()[-1]
    assert re.fullmatch(rf"stopped by {number.name}: \d+ of 400 images .* continues", last), text
    assert "Traceback" not in text
    left = {path.name for path in (tmp_path / "out" / ".units").iterdir()}
    assert not [name for name in left if name.endswith((".claim", ".tmp"))]
    json.loads((tmp_path / "out" / ".units" / "recipe.json").read_text())


def test_a_full_disk_ends_in_one_line_and_the_same_command_continues(
    sample: Sample, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    given = {"format": "npz", "n": 30, "batch": 10}
    with largest_file(4000), pytest.raises(UserError, match="out=.* cannot be written .*: raise"):
        sample("out", **given)
    assert (sample("out", **given) / "samples.npz").stat().st_size > 4000
    assert contents(sample("out", **given)) == contents(sample("alone", **given))
