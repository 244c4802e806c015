"""Tensors in temporary files."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.formats.scratch import Planes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_as_they_were_written(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.randn(3, 7, 5).to(dtype)
    planes = Planes((3, 7, 5), dtype, tmp_path)
    planes.write(0, whole[:, :4])
    planes.write(4, whole[:, 4:])
    assert torch.equal(planes.read(0, 7), whole)
    assert torch.equal(planes.read(2, 6), whole[:, 2:6])


def test_rows_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    planes = Planes((3, 7, 5), torch.float32, tmp_path)
    planes.write(0, torch.zeros(3, 4, 5))
    with pytest.raises(EOFError, match="rows 3 to 7"):
        planes.read(3, 7)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    planes = Planes((3, 7, 5), torch.float32, tmp_path)
    planes.write(0, torch.zeros(3, 7, 5))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    planes = Planes((3, 700, 50), torch.float32, tmp_path)
    with largest_file(1000), pytest.raises(UserError, match=str(tmp_path)):
        planes.write(0, torch.zeros(3, 700, 50))
