"""A step of a run that has found its pace never has the host wait for the GPU, and all that it
copies there is fetched from pinned memory meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.cells import Cell

CELLS = [
    Cell(stage, precision, look="steady")
    for stage in ("vqgan", "gpt")
    for precision in ("fp32", "bf16", "fp16")
] + [Cell(kind, "bf16", look="steady") for kind in ("llama", "rar", "masked")]
# images of two micro-batches, augmentation draws, which latents restart codes and their noise
# (none if no code is dead); of two micro-batches codes, classes, and what is drawn: chances and
# codes of noise, which conditions are dropped, orders; numbers, weights and scores of masks
COPIES = {"vqgan": [3, 4, 5], "gpt": [8], "llama": [10], "rar": [12], "masked": [12]}


@pytest.fixture(scope="module")
def found(device: str, run_cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_cells(device, [cell.name for cell in CELLS])


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_host_never_waits_in_a_steady_step(
    device: str, found: dict[str, Any], cell: Cell
) -> None:
    line = found[cell.name]
    assert "error" not in line, line["error"]
    assert line["device"] == device
    assert "loss" in line["metrics"]
    if device == "cuda":
        assert set(line["copies"]) == {"pinned, not waited for"}
        assert len(line["copies"]) in COPIES[cell.stage]
