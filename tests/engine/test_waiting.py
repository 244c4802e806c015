"""A steady step of training asks nothing of the device and copies no number to it, at any ZeRO
stage: the host does not wait. (Seen on the CPU; tests/gpu has CUDA itself say so.)"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("waiting_worker.py")


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What waits, by run, on either rank of a pair."""
    return run_worker(WORKER, worlds=("two",))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["vqgan", "prior"])
@pytest.mark.parametrize("zero", range(4))
def test_a_steady_step_has_the_host_wait_for_nothing(
    found: dict[str, Any], zero: int, run: str
) -> None:
    for rank in ("two-0", "two-1"):
        assert found[rank][f"zero{zero} {run}"] == []
