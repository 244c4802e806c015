"""`engine.fast` on the CPU: the shorter way trains as the plain one does, under every engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("fast_worker.py")


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_worker(WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("rank", ["one-0", "two-0"])
def test_it_is_taken_or_left_and_changes_nothing_but_rounding(
    found: dict[str, Any], rank: str, zero: int
) -> None:
    fast, plain = found[rank][f"{zero} True"], found[rank][f"{zero} False"]
    assert plain["calls"] == [0, 0]
    assert min(fast["calls"]) > 0
    assert fast["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert fast["losses"] != plain["losses"]
    assert fast["losses"][0] != fast["losses"][-1]
    weights = {name for name in plain["norms"] if name.endswith("weight")}
    for name in weights:
        assert fast["norms"][name] == pytest.approx(plain["norms"][name], rel=1e-4, abs=5e-4), name
