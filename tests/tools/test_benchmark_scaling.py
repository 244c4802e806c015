"""Real ranks send each other what is said of DeepSpeed's stages, to the byte."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks.forecast import SMALL  # noqa: E402
from benchmarks.traffic import GATHER, SCATTER, SUM  # noqa: E402

WORKER = Path(__file__).with_name("scaling_worker.py")
NORM = 4  # bytes
LITTLE = 100_000  # bytes of stage 1's statistics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one of two ranks found, by stage of training and of ZeRO."""
    out = tmp_path_factory.mktemp("scaling") / "found.json"
    command = [sys.executable, str(WORKER), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_a_transformers_ranks_send_what_is_expected(found: dict[str, Any]) -> None:
    """With two micro-batches, of which ZeRO 2 and 3 send each."""
    whole = 4 * found["2"]["0"]["parameters"]
    expected = {
        "0": {SUM: whole},
        "1": {SUM: whole, GATHER: whole},
        "2": {SUM: 2 * whole, GATHER: whole},
        "3": {SCATTER: 2 * whole, GATHER: 2 * whole},
    }
    for zero, messages in expected.items():
        assert found["2"][zero]["expected"] == messages
        norm = {} if zero == "0" else {SUM: messages.get(SUM, 0) + NORM}
        assert found["2"][zero]["bytes"] == messages | norm


def test_the_first_stage_sends_little_beside_its_networks(found: dict[str, Any]) -> None:
    """Statistics; at ZeRO 3 a little less, where a layer's weights are still there."""
    for rank in found["1"].values():
        for kind, size in rank["bytes"].items():
            assert abs(size - rank["expected"].get(kind, 0)) < LITTLE
    assert found["1"]["0"]["calls"] == {SUM: 2 + SMALL}
