"""`tools/benchmark.py memory` finds what ZeRO is expected to hold, on real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.mark.slow
def test_ranks_hold_what_zero_promises(tmp_path: Path) -> None:
    """Above ZeRO 0 with DeepSpeed's fp32 copy of the own share; gradients of ZeRO 2 are shared out
    by whole tensors."""
    out = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPT), "memory", "--ranks", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(out.read_text())
    size = figures["2 ranks, ZeRO 0"]["parameters"]
    assert size > 15e6
    per_parameter = {
        name: [found[part] / size for part in ("weights", "gradients", "optimizer")]
        for name, found in figures.items()
    }
    expected = {0: [4, 4, 8], 1: [4, 4, 2 + 4], 2: [4, 2, 2 + 4], 3: [2, 2, 2 + 4]}
    for zero, parts in expected.items():
        assert per_parameter[f"2 ranks, ZeRO {zero}"] == pytest.approx(parts, rel=0.15)
    assert all(found["average"] > 0 for found in figures.values())
