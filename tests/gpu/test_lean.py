"""Kernels of our own for E, G and the search for codes: as exact as the plain form, under every
engine that uses them. On the CPU Triton interprets them."""

import json
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.gpu.conftest import finish, start
from tests.gpu.test_matrix import BOUNDS, LOSSES, NORMS, difference

WORKER = Path(__file__).with_name("lean_worker.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is on Linux only")
NETWORKS = pytest.mark.parametrize("network", ["encoder", "decoder"])


@pytest.fixture(scope="module")
def found(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lean")
    how = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    finish(start([str(WORKER), "found.json"], device, folder, **how), 560)
    lines: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return lines


@needs_triton
@NETWORKS
def test_outputs_and_gradients_are_exact_in_fp32(found: dict[str, Any], network: str) -> None:
    lean = found[network]["fp32 lean"]
    assert len(lean) > 40
    assert max(lean.values()) < 2e-5


@needs_triton
@NETWORKS
def test_in_bf16_they_are_as_near_to_fp64_as_those_of_the_plain_form(
    found: dict[str, Any], network: str
) -> None:
    plain, lean = (found[network][f"bf16 {form}"] for form in ("plain", "lean"))
    assert lean["output"] < 1.5 * plain["output"]
    assert median(lean[name] / error for name, error in plain.items()) < 1.6
    for name, error in plain.items():  # of a single small tensor chance decides
        assert lean[name] < 3 * error + 5e-3, name


@needs_triton
def test_the_search_finds_the_nearest_codes_the_first_of_those_that_tie(
    found: dict[str, Any],
) -> None:
    searched = found["searched"]
    assert searched["farther"] < 1e-6
    assert searched["ties"] == [0, 0, 0]
    assert searched["nan"]


@needs_triton
def test_training_by_them_gives_the_figures_of_the_plain_form(found: dict[str, Any]) -> None:
    plain, lean = (found[f"trained {form}"]["lines"] for form in ("plain", "lean"))
    assert plain != lean
    losses, norms, _ = BOUNDS["bf16"]
    assert difference(lean, plain, LOSSES) < losses
    assert difference(lean, plain, NORMS) < norms


@needs_triton
def test_training_by_them_in_recorded_passes_gives_the_figures_of_the_same_kernels(
    device: str, found: dict[str, Any]
) -> None:
    lean, graphs = (found[f"trained {form}"]["lines"] for form in ("lean", "graphs"))
    if device == "cpu":
        assert graphs == lean
    losses, norms, _ = BOUNDS["bf16"]
    assert difference(graphs, lean, LOSSES) < losses
    assert difference(graphs, lean, NORMS) < norms
