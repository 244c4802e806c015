"""Two ranks, each on a card of its own, log what one rank on the CPU does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.cells import Cell
from tests.gpu.test_matrix import BOUNDS, LOSSES, difference


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("stage", ["vqgan", "gpt", "rar"])
def test_two_ranks_train_as_one_does(
    device: str, run_cells: Callable[..., dict[str, Any]], stage: str, zero: int
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes a card for each rank, and there is one")
    cell, alone = Cell(stage, zero=zero), Cell(stage)
    found = run_cells(device, [cell.name], ranks=2)[cell.name]
    expected = run_cells("cpu", [alone.name])[alone.name]
    for line in (found, expected):
        assert "error" not in line, line["error"]
    assert difference(found["lines"], expected["lines"], LOSSES) < BOUNDS["fp32"][0]
