"""Tensors in flat pieces: whatever the cut they were written with, any other reads them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from taming_dist.engine import pieces
from taming_dist.engine.pieces import Piece, Pieces, write_pieces
from taming_dist.errors import UserError

SHAPES = {"weights/a": 7, "exp_avg/a": 7, "weights/b.c": 1, "buffers/count": 3}


def values_of(name: str) -> torch.Tensor:
    dtype = torch.int64 if name == "buffers/count" else torch.float32
    return torch.arange(SHAPES[name]).to(dtype) + len(name)


def shares(length: int, ranks: int) -> list[slice]:
    return [slice(length * r // ranks, length * (r + 1) // ranks) for r in range(ranks)]


def write(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        mine = []
        for name, length in SHAPES.items():
            here = shares(length, ranks)[rank]
            if here.stop > here.start:
                mine.append(Piece(name, here.start, values_of(name)[here]))
        write_pieces(folder, mine, rank, ranks)


@settings(max_examples=15, deadline=None)
@given(writers=st.integers(1, 5), readers=st.integers(1, 5))
def test_any_cut_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, writers: int, readers: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    write(folder, writers)
    for rank in range(readers):
        found = Pieces(folder, rank)
        for name, length in SHAPES.items():
            here = shares(length, readers)[rank]
            part = torch.zeros_like(values_of(name)[here])
            found.fill(name, here.start, part)
            assert torch.equal(part, values_of(name)[here])


def test_a_large_share_is_cut_into_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LARGEST_FILE", 30)
    write(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3
    found = torch.zeros(7)
    Pieces(tmp_path, 0).fill("exp_avg/a", 0, found)
    assert torch.equal(found, values_of("exp_avg/a"))


def test_a_rank_that_resumes_as_it_was_opens_its_own_file_only(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "rank-00000-of-00002.000.safetensors").write_bytes(b"never read")
    here = shares(7, 2)[1]
    part = torch.zeros(here.stop - here.start)
    Pieces(tmp_path, 1).fill("weights/a", here.start, part)
    assert torch.equal(part, values_of("weights/a")[here])


def test_what_is_missing_is_counted_and_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "rank-00001-of-00003.000.safetensors").unlink()
    with pytest.raises(UserError, match=r"2 of the 7 numbers of weights/a from 0 on are missing"):
        Pieces(tmp_path, 0).fill("weights/a", 0, torch.zeros(7))
    with pytest.raises(UserError, match="1 of the 1 numbers of weights/unknown from 0 on"):
        Pieces(tmp_path, 0).fill("weights/unknown", 0, torch.zeros(1))
    assert "weights/unknown" not in Pieces(tmp_path, 0)


def test_a_file_that_is_none_of_tensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "rank-00000-of-00001.000.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match=r"rank-00000-of-00001\.000\.safetensors is no file of"):
        Pieces(tmp_path, 0)
    save_file({"no place": torch.zeros(2)}, tmp_path / "rank-00000-of-00001.000.safetensors")
    with pytest.raises(UserError, match="is no file of a checkpoint's tensors"):
        Pieces(tmp_path, 0)
