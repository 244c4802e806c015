"""Gradients between ranks: rounded as engine.reduce says at every stage, in buckets of its size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("reduction_worker.py")
WEIGHTS = 4 + 6 * 16  # as there; a bucket is of 40
MEANS = {"fp32": (2**-6 + 2**-15) / 2, "bf16": 2**-7}


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What both ranks found, by name of the run."""
    return run_worker(WORKER, worlds=("two",))


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero", range(4))
def test_gradients_are_added_up_in_the_precision_that_is_asked_for(
    found: dict[str, Any], zero: int, precision: str, reduce: str
) -> None:
    """Whatever layer they are of, and whatever precision it computes in: autocast casts weights,
    which are in fp32 themselves, as is what the optimizer moves."""
    for rank in ("two-0", "two-1"):
        metrics = found[rank][f"zero{zero} {precision} {reduce}"]
        assert metrics["skipped_steps"] == 0
        assert metrics["kept"] == ["torch.float32"]
        assert metrics["gradient_norm"] == pytest.approx(MEANS[reduce] * WEIGHTS**0.5, rel=1e-6)


@pytest.mark.slow
def test_the_buckets_at_zero_0_have_their_size(found: dict[str, Any]) -> None:
    """A bucket is sent by the parameter that makes it larger than that."""
    assert found["two-0"]["sizes"] == [4 + 3 * 16, 3 * 16]
