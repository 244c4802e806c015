"""Real ranks send each other what is said of DeepSpeed's stages, to the byte."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from benchmarks.forecast import SMALL  # noqa: E402
from benchmarks.rows import load  # noqa: E402

NORM = 4  # bytes
LITTLE = 100_000  # bytes of stage 1's statistics


def measured(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The notes of a row for each stage of ZeRO, on two ranks."""
    out = folder / "rows.json"
    command = [sys.executable, str(TOOLS / "benchmark.py"), "scaling", "--ranks", "2", "--steps"]
    command += ["1", "--batch", "1", *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ((found),) = load(out)
    return [row.notes for row in found.rows]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_transformers_ranks_send_what_is_expected(tmp_path: Path, accumulation: int) -> None:
    options = ["--stages", "2", "--layers", "2", "--width", "64", "--tokens", "16"]
    rows = measured(tmp_path, *options, "--accumulation", str(accumulation))
    for zero, found in enumerate(rows):
        beside = 1e6 * (found["sent MB"] - found["as DeepSpeed is set MB"])
        assert beside == pytest.approx(0 if zero == 0 else NORM, abs=0.1)
        assert found["messages"] >= (1 if zero == 0 else 4)
        assert found["alone ms"] > 0
    least = rows[0]["least in theory MB"]
    sums = [found["sent MB"] / least for found in rows]
    expected = {1: [1, 1.5, 1.5, 1], 2: [1, 1.5, 2.5, 2]}[accumulation]
    assert sums == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_first_stage_sends_little_more_than_its_networks(tmp_path: Path) -> None:
    (found,) = measured(tmp_path, "--stages", "1", "--zero", "3", "--size", "32")
    beside = 1e6 * (found["sent MB"] - found["as DeepSpeed is set MB"])
    assert 0 < beside < LITTLE
    (found,) = measured(tmp_path, "--stages", "1", "--zero", "0", "--size", "32")
    beside = 1e6 * (found["sent MB"] - found["as DeepSpeed is set MB"])
    assert 0 < beside < LITTLE
    assert found["messages"] == 2 + SMALL
