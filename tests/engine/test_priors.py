"""Every kind of block under ZeRO, with the optimizer on the device or the host, resumed half-way:
the same losses and averaged weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("priors_worker.py")


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_worker(WORKER, worlds=("two",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        "llama recomputed",
        "gpt zero1",
        "llama zero3",
        "rar zero1 offload",
        "llama zero2 offload",
        "gpt zero3 offload",
        "llama zero1 compiled",
        "rar zero3 compiled",
        "next_scale zero2",
        "next_scale zero3",
        "next_scale zero1 compiled",
    ],
)
def test_a_prior_learns_the_same_however_it_is_cut_and_placed(
    found: dict[str, Any], run: str
) -> None:
    mine, plain = found["two-0"][run], found["two-0"][f"{run.split()[0]} plain"]
    losses = [line["loss"] for line in mine["lines"]]
    assert not any(line.get("recompilations") for line in mine["lines"])
    assert losses == pytest.approx([line["loss"] for line in plain["lines"]], rel=1e-5)
    assert mine["norms"] == pytest.approx(plain["norms"], rel=1e-4, abs=1e-5)
    assert losses[0] != losses[-1]
