"""Codebooks under ZeRO 0 to 3, on one and two ranks: set from the first global batch, dead codes
restarted with their optimizer state, entropies over all ranks. Three processes run all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("restarts_worker.py")
# the names in the worker
QUANTIZERS = ["restarted", "ema", "gumbel", "fsq", "lfq", "bsq", "ibq", "simvq"]
QUANTIZERS += ["multiscale", "product", "residual"]
RUNS = [f"zero{zero} {quantizer}" for quantizer in QUANTIZERS for zero in range(4)]


@pytest.fixture(scope="module")
def found(run_worker: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What the single process and both ranks of the pair found, by name of the run."""
    return run_worker(WORKER)


def assert_same(lines: list[Any], expected: list[Any]) -> None:
    assert len(lines) == len(expected)
    for step, (line, other) in enumerate(zip(lines, expected, strict=True)):
        assert line == pytest.approx(other, rel=2e-4, abs=2e-4), f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("process", ["one-0", "two-0"])
def test_every_stage_and_number_of_ranks_gives_the_same_losses(
    found: dict[str, Any], process: str, run: str
) -> None:
    """But for gumbel, whose noise each rank draws for itself."""
    quantizer = run.split()[1]
    reference = found[process if quantizer == "gumbel" else "one-0"][f"zero0 {quantizer}"]
    assert_same(found[process][run]["lines"], reference["lines"])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_both_ranks_hold_the_same_codebook_to_the_bit(found: dict[str, Any], run: str) -> None:
    assert found["two-0"][run] == found["two-1"][run]


@pytest.mark.slow
def test_the_codebook_was_set_and_codes_were_restarted(found: dict[str, Any]) -> None:
    lines = found["one-0"]["zero0 restarted"]["lines"]
    assert lines[0]["codebook_revived"] == 0
    assert lines[1]["codebook"] < lines[0]["codebook"]
    assert sum(line["codebook_revived"] for line in lines) > 0


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("process", ["one-0", "two-0"])
def test_a_resumed_run_goes_on_to_the_bit_and_is_not_set_again(
    found: dict[str, Any], process: str, zero: int
) -> None:
    whole = found[process][f"zero{zero} restarted"]["lines"]
    assert found[process][f"zero{zero} resumed"] == whole[2:]


@pytest.mark.slow
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
