"""Stage 2 of every kind, however it is cut: ZeRO 0 to 3, 1, 2 and 4 ranks, micro-batches.

Blocks, orders, schemes and conditions with dropout for guidance, as tests/engine/small_prior.py has
them; test_equality.py has the plain one for `make test`. All of it is slow.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("cuts_worker.py")
KINDS = ("gpt", "llama", "rar", "masked", "codes")
WORLDS, SAVED = ("one", "two", "four"), 3
Found = dict[str, dict[str, Any]]

pytestmark = pytest.mark.slow
every_kind = pytest.mark.parametrize("kind", KINDS)
every_stage = pytest.mark.parametrize("zero", range(4))
every_world = pytest.mark.parametrize("world", WORLDS)


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., Found]) -> Found:
    """What each rank found, by run."""
    return run_worker(WORKER, worlds=WORLDS)


@every_kind
@every_stage
@every_world
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_cut_changes_losses_or_weights(
    found: Found, kind: str, zero: int, world: str, accumulation: int
) -> None:
    mine = found[f"{world}-0"][f"{kind} zero{zero} x{accumulation}"]
    reference = found["one-0"][f"{kind} zero0 x1"]
    for step, (line, other) in enumerate(zip(mine["lines"], reference["lines"], strict=True)):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5), f"step {step}"
    assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-3, abs=2e-3)


@every_kind
@every_stage
@every_world
def test_a_resumed_run_goes_on_to_the_bit(found: Found, kind: str, zero: int, world: str) -> None:
    mine = found[f"{world}-0"][f"{kind} zero{zero} x1"]
    assert mine["resumed"] == mine["lines"][SAVED:]


@every_kind
@every_stage
@every_world
def test_after_a_load_each_group_has_the_rate_and_the_decay_of_its_run(
    found: Found, kind: str, zero: int, world: str
) -> None:
    """They were saved by a run with another weight decay; biases, norms and tables have none."""
    assert found[f"{world}-0"][f"{kind} zero{zero} x1"]["groups"] == [[0.25, 0.3], [0.25, 0.0]]


@every_kind
@every_stage
@every_world
def test_guided_samples_of_weights_that_are_cut_up_are_those_of_whole_ones(
    found: Found, kind: str, zero: int, world: str
) -> None:
    ranks = [runs for name, runs in found.items() if name.startswith(world)]
    assert all(runs[f"{kind} zero{zero} x1"]["samples"] for runs in ranks)


@every_kind
def test_the_runs_train_and_differ_from_kind_to_kind(found: Found, kind: str) -> None:
    lines = {other: found["one-0"][f"{other} zero0 x1"]["lines"] for other in KINDS}
    losses = [line["loss"] for line in lines[kind]]
    assert len(set(losses)) == len(losses)
    assert sum(lines[other][-1] == lines[kind][-1] for other in KINDS) == 1
