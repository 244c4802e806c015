"""Codebooks under ZeRO 0 to 3, on one and two ranks: set from the first global batch, dead codes
revived with their optimizer state, entropies over all ranks. Three processes run all of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("renewal_worker.py")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
RUNS = [f"zero{zero} renewed" for zero in range(4)]
RUNS += ["zero0 lfq", "zero0 ibq", "zero3 ibq"]


def start(out: Path, **variables: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(out)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the single process and both ranks of the pair found, by name of the run."""
    folder = tmp_path_factory.mktemp("renewal")
    master = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start(folder / "one")] + [
        start(folder / "two", RANK=str(rank), LOCAL_RANK=str(rank), **master) for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output[-4000:]
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("one-0", "two-0", "two-1")
    }


def assert_same(lines: list[Any], expected: list[Any]) -> None:
    assert len(lines) == len(expected)
    for step, (line, other) in enumerate(zip(lines, expected, strict=True)):
        assert line == pytest.approx(other, rel=2e-4, abs=2e-4), f"step {step}"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("process", ["one-0", "two-0"])
def test_every_stage_and_number_of_ranks_gives_the_same_losses(
    found: dict[str, Any], process: str, run: str
) -> None:
    reference = found["one-0"][f"zero0 {run.split()[1]}"]
    assert_same(found[process][run]["lines"], reference["lines"])


@pytest.mark.parametrize("run", RUNS)
def test_both_ranks_hold_the_same_codebook_to_the_bit(found: dict[str, Any], run: str) -> None:
    assert found["two-0"][run] == found["two-1"][run]


def test_the_codebook_was_set_and_codes_were_revived(found: dict[str, Any]) -> None:
    lines = found["one-0"]["zero0 renewed"]["lines"]
    assert lines[0]["revived"] == 0
    assert lines[1]["codebook"] < lines[0]["codebook"]
    assert sum(line["revived"] for line in lines) > 0


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("process", ["one-0", "two-0"])
def test_a_resumed_run_goes_on_to_the_bit_and_is_not_set_again(
    found: dict[str, Any], process: str, zero: int
) -> None:
    whole = found[process][f"zero{zero} renewed"]["lines"]
    assert found[process][f"zero{zero} resumed"] == whole[2:]


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("process", ["one-0", "two-0"])
@pytest.mark.parametrize("kind", ["replaced", "averaged"])
def test_replaced_rows_have_their_values_and_no_moments(
    found: dict[str, Any], process: str, zero: int, kind: str
) -> None:
    """Neither in the weights nor in their average is anything left of the old rows."""
    before, after = found[process][f"zero{zero} {kind}"]
    for row in range(5):
        if row in (1, 4):
            assert before[row] == after[row] == [7.0] * 3
        else:
            assert before[row] != [1.0] * 3  # the first step moved it ...
            assert after[row] != before[row]  # ... and its momentum moves it still
