import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.tiny_models import tiny_config

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return runpy.run_path(str(TOOLS / "inspect_codes.py"))["main"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config(VectorQuantizerConfig(codes=8, dim=4), latent_channels=32)
    VQGAN(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_codes(folder: Path, fingerprint: str) -> Path:
    """6 images of 4 x 4 codes: half of the codes are 0, an eighth each 1, 2, 3 and 4."""
    folder.mkdir()
    codes = np.tile(np.array([0, 0, 0, 0, 1, 2, 3, 4], np.uint16), 12).reshape(6, 1, 4, 4)
    facts = {
        "vocab": 8,
        "tokenizer": {"fingerprint": fingerprint},
        "source": {"fingerprint": "e", "range": [0, 6], "bad": []},
        "preprocessing": {},
    }
    classes = np.array([0, 0, 0, 2, 2, 1], dtype=np.int32)
    shard = CodeShard(facts, codes, np.arange(6), list("abcdef"), classes)
    shard.save(folder / "codes-000000.tar")
    write_codes_manifest(folder, ["codes-000000.tar"], ("a<b", "cat", "dog"))
    return folder


def test_usage_perplexity_and_classes_are_counted(inspect: Any, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "codes", "f")
    inspect([str(codes)])
    figures = json.loads((codes / "inspection" / "figures.json").read_text())
    assert figures["codebook_usage"] == 5 / 8
    assert figures["codebook_perplexity"] == pytest.approx(4.0)  # entropy 2 bits
    assert figures["most_frequent_share"] == 0.5
    page = (codes / "inspection" / "index.html").read_text()
    assert re.findall(r"<tr><td>(.*?)</td><td><b>(\d+)</b>", page) == [
        ("a&lt;b", "3"),
        ("dog", "2"),
        ("cat", "1"),
    ]
    assert page.count("<rect") == 8


def test_random_samples_are_decoded_into_a_picture_that_the_page_holds(
    inspect: Any, model: Path, tmp_path: Path
) -> None:
    codes = write_codes(tmp_path / "codes", VQGAN.from_pretrained(model).fingerprint)
    torch.manual_seed(0)
    inspect([str(codes), "--model", str(model), "--out", str(tmp_path / "look"), "--samples", "5"])
    with Image.open(tmp_path / "look" / "samples.png") as picture:
        assert picture.size == (5 * 8 + 4 * 2, 8)
    page = (tmp_path / "look" / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)='?(https?:)?//", page)


def test_another_vqgan_than_the_one_that_wrote_the_codes_is_refused(
    inspect: Any, model: Path, tmp_path: Path
) -> None:
    codes = write_codes(tmp_path / "codes", "f" * 64)
    with pytest.raises(UserError, match=f"--model .* was written by {'f' * 64}"):
        inspect([str(codes), "--model", str(model)])
    assert not (codes / "inspection").exists()


def test_names_of_any_bytes_are_shown(
    inspect: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of a manifest that was written before names of classes were escaped."""
    codes = write_codes(tmp_path / os.fsdecode(b"cod\xe9s"), "f")
    manifest = (codes / "manifest.json").read_text()
    (codes / "manifest.json").write_text(manifest.replace('"a<b"', '"caf\\udce9"'))
    inspect([str(codes)])
    page = (codes / "inspection" / "index.html").read_text(encoding="utf-8")
    assert "<td>caf\\xe9</td>" in page
    assert "Codes: cod\\xe9s" in page
    assert "cod\\xe9s/inspection/index.html" in capsys.readouterr().out
