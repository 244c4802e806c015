"""Writing to a disk that takes no more: one line that names the folder, whoever writes."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.formats.files import PROBE_BYTES, writing

LIMIT = PROBE_BYTES // 2
TENSORS = {"a": torch.zeros(LIMIT)}
WRITERS: list[Callable[[Path], object]] = [
    lambda folder: (folder / "plain").write_bytes(bytes(2 * LIMIT)),
    lambda folder: write_bytes(folder / "whole", bytes(2 * LIMIT)),
    lambda folder: save_file(TENSORS, folder / "a.safetensors"),
    lambda folder: torch.save(TENSORS, folder / "a.pt"),
]


@pytest.mark.parametrize("write", WRITERS)
def test_whatever_meets_a_limit_of_the_system_ends_in_one_line(
    tmp_path: Path,
    write: Callable[[Path], object],
    largest_file: Callable[[int], AbstractContextManager[None]],
) -> None:
    with largest_file(LIMIT), pytest.raises(UserError) as caught, writing(tmp_path, "--out "):
        write(tmp_path)
    assert str(caught.value) == (
        f"--out {tmp_path} cannot be written (File too large): raise the limit on the size of "
        f"files (ulimit -f), then run the same command again"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "(No space left on device): make room on its disk, then"),
        (errno.EDQUOT, "(Disk quota exceeded): make room within your quota, then"),
        (errno.EROFS, "(Read-only file system): remount its disk for writing, then"),
    ],
)
def test_each_reason_comes_with_its_fix(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(UserError) as caught, writing(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(caught.value).startswith(f"{tmp_path} cannot be written {said}")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        RuntimeError("[enforce fail at inline_container.cc:672] . the disk is not full"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        UserError("of something within"),
    ],
)
def test_what_is_no_limit_of_the_system_is_raised_as_it_is(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error
