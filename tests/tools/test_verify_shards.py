import io
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.formats.manifest import write_index
from tests.data.shard_files import writing_shards

TOOL = Path(__file__).parents[2] / "tools" / "verify_shards.py"
verify_shards = runpy.run_path(str(TOOL))["main"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    with writing_shards(tmp_path, "train", 3) as write:
        for number in range(6):
            write(f"{number}", {"png": out.getvalue()})
    return tmp_path


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    facts = {
        "vocab": 8,
        "tokenizer": {"fingerprint": "f"},
        "source": {"fingerprint": "e", "range": [0, 3], "bad": []},
        "preprocessing": {},
    }
    array = np.arange(6, dtype=np.uint16).reshape(3, 1, 1, 2)
    CodeShard(facts, array, np.arange(3), ["a", "b", "c"]).save(tmp_path / "codes-000000.tar")
    write_codes_manifest(tmp_path, ["codes-000000.tar"], None)
    return tmp_path


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_whole_shards_pass(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_shards([str(images)])
    assert "2 shards, 6 samples" in capsys.readouterr().out


def test_whole_code_shards_pass(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_shards([str(codes)])
    assert "1 shard, 3 samples" in capsys.readouterr().out


def test_one_flipped_bit_is_found(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(images / "train-000001.tar", 550)
    with pytest.raises(UserError, match="1 of 2 shards"):
        verify_shards([str(images)])
    assert "train-000001.tar has contents that differ" in capsys.readouterr().out


def test_a_flipped_bit_in_codes_is_found(codes: Path) -> None:
    path = codes / "codes-000000.tar"
    flip(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="1 of 1 shard in"):
        verify_shards([str(codes)])


def test_a_manifest_that_says_something_else_of_its_codes_is_found(
    codes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = codes / "manifest.json"
    path.write_text(path.read_text().replace('"vocab": 8', '"vocab": 9'))
    with pytest.raises(UserError, match="1 of 1 shard in"):
        verify_shards([str(codes)])
    assert "has the vocab 8, its manifest says 9" in capsys.readouterr().out


def test_missing_cut_and_wrongly_indexed_shards_are_found(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_index(images / "train-000000.tar", np.array([0, 512, 2048, 3072]))
    (images / "train-000001.tar").unlink()
    with pytest.raises(UserError, match="2 of 2 shards"):
        verify_shards([str(images)])
    out = capsys.readouterr().out
    assert "train-000000.tar.idx is wrong" in out
    assert "train-000001.tar is missing" in out
