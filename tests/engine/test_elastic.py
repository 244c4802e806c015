"""Checkpoints are read by any number of ranks at any ZeRO stage, and training goes on as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("elastic_worker.py")
WORLDS, SAVED = ("one", "two", "four"), 3
KINDS = ("prior", "vqgan", "decoder")  # the last with frozen encoder and codebook
TOLERANCE = {"prior": 2e-5, "vqgan": 1e-4, "decoder": 1e-4}  # relative, over three steps
PAIRS = {"prior": 72, "vqgan": 36, "decoder": 36}
Found = dict[str, dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., Found]) -> Found:
    """What each rank found, by what it resumed, and where."""
    return run_worker(WORKER, *WORLDS, worlds=WORLDS)


def resumed(found: Found, kind: str) -> list[tuple[str, str, list[dict[str, float]]]]:
    """Who saved it, who resumed it, and how it went on, of every such pair of a kind."""
    pairs = []
    for world in WORLDS:
        for name, lines in found[f"{world}-0"].items():
            source, at, reader = name.partition(" at ")
            if at and name.startswith(kind):
                pairs.append((source, f"{kind}-{reader}", lines))
    assert len(pairs) == PAIRS[kind]
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written_to_the_bit(found: Found, kind: str) -> None:
    """Weights, moments, averages, buffers, steps: saved again by other ranks at other stages."""
    same = {
        name: value
        for world in WORLDS
        for name, value in found[f"{world}-0"].items()
        if name.startswith(f"same {kind}")
    }
    assert len(same) == PAIRS[kind]
    assert [name for name, value in same.items() if not value] == []


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_alike_on_any_ranks_at_any_stage(found: Found, kind: str) -> None:
    for source, reader, lines in resumed(found, kind):
        there = found[f"{source.split('-')[1]}-0"][source][SAVED:]
        for line, other in zip(lines, there, strict=True):
            assert line == pytest.approx(other, rel=TOLERANCE[kind], abs=1e-6), (
                f"{source} at {reader}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_after_it_has_the_loss_of_the_run_that_went_on(
    found: Found, kind: str
) -> None:
    for source, reader, lines in resumed(found, kind):
        there = found[f"{source.split('-')[1]}-0"][source][SAVED]
        assert lines[0]["loss"] == pytest.approx(there["loss"], rel=2e-6), f"{source} at {reader}"


def test_as_many_ranks_at_the_same_stage_go_on_to_the_bit(found: Found) -> None:
    same = [pair for pair in resumed(found, "prior") if pair[0] == pair[1]]
    assert len(same) == 12
    for source, _, lines in same:
        assert lines == found[f"{source.split('-')[1]}-0"][source][SAVED:], source


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("world", WORLDS)
def test_groups_have_the_rate_and_the_decay_of_the_run_that_resumes(
    found: Found, kind: str, zero: int, world: str
) -> None:
    """The run that saved had another weight decay, ranks and stage; tables and norms have none."""
    groups = found[f"{world}-0"][f"groups of {kind} at {world}-{zero}"]
    assert groups == ([[0.25, 0.3], [0.25, 0.0]] if kind == "prior" else [[0.25, 0.3]])
