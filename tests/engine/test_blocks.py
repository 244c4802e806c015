"""Recomputed and compiled blocks: the same losses and weights as plain ones, under ZeRO 0 to 3."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taming_dist.engine.settings import EngineConfig
from taming_dist.errors import UserError

WORKER = Path(__file__).with_name("blocks_worker.py")


def assert_same(found: dict[str, Any], zero: int, variant: str, tolerance: float) -> None:
    for process in found.keys() & {"one-0", "two-0"}:
        for network in ("vqgan", "vit", "gpt"):
            mine = found[process][f"zero{zero} {variant} {network}"]
            plain = found[process][f"zero{zero} plain {network}"]
            assert mine["losses"] == pytest.approx(plain["losses"], rel=tolerance)
            assert mine["norms"] == pytest.approx(plain["norms"], rel=1e-4, abs=5e-4)
            assert plain["losses"][0] != plain["losses"][-1]


@pytest.fixture(scope="module")
def found(run_worker: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    return run_worker(WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_recomputed_blocks_change_nothing_but_run_twice(found: dict[str, Any], zero: int) -> None:
    """With dropout, whose noise has to come again."""
    assert_same(found, zero, "recompute", 1e-6)
    plain, again = (
        found["one-0"][f"zero{zero} {name} vqgan"]["calls"] for name in ("plain", "recompute")
    )
    assert again == 2 * plain


@pytest.mark.slow
def test_vision_transformers_learn_the_same_at_every_stage_of_zero(found: dict[str, Any]) -> None:
    for process in ("one-0", "two-0"):
        plain = found[process]["zero0 plain vit"]
        for zero in (1, 2, 3):
            other = found[process][f"zero{zero} plain vit"]
            assert other["losses"] == pytest.approx(plain["losses"], rel=1e-5)
            assert other["norms"] == pytest.approx(plain["norms"], rel=1e-4, abs=5e-4)


@pytest.mark.slow
def test_compiled_blocks_change_nothing(tmp_path: Path) -> None:
    """Recomputed ones, in one process: compiling takes minutes."""
    environment = os.environ | {"BLOCKS": "compile", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(tmp_path / "one")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=560
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {"one-0": json.loads((tmp_path / "one-0.json").read_text())}
    for zero in (0, 3):
        assert_same(found, zero, "compile", 1e-4)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"engine\.compile=true needs a C\+\+ compiler"):
        EngineConfig(compile=True)
