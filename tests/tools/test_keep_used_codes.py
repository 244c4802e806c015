"""tools/keep_used_codes.py on code shards that tools/tokenize_dataset.py wrote."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.data.shard_files import writing_shards
from tests.tiny_models import tiny_config

TOOLS = Path(__file__).parents[2] / "tools"
tokenize = runpy.run_path(str(TOOLS / "tokenize_dataset.py"))["main"]
keep_used_codes = runpy.run_path(str(TOOLS / "keep_used_codes.py"))["main"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a VQGAN, image shards and their codes."""
    torch.manual_seed(0)
    config = tiny_config(
        VectorQuantizerConfig(codes=64, dim=4, normalized=True), 16, latent_channels=32
    )
    VQGAN(config).save_pretrained(tmp_path / "export")
    randomness = np.random.default_rng(0)
    with writing_shards(tmp_path / "images", "train", 8) as write:
        for number in range(3):
            out = io.BytesIO()
            pixels = randomness.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            write(f"{number:04d}", {"png": out.getvalue()})
    run_tokenize(tmp_path, "export", "codes")
    return tmp_path


def run_tokenize(folder: Path, model: str, out: str) -> None:
    tokenize(
        ["--model", str(folder / model), "--shards", str(folder / "images")]
        + ["--out", str(folder / out)]
    )


def run(folder: Path, model: str = "export", out: str = "small") -> None:
    keep_used_codes(
        ["--model", str(folder / model), "--codes", str(folder / "codes")]
        + ["--out", str(folder / out)]
    )


def test_the_smaller_vqgan_gives_the_same_images_of_the_same_data(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(made)
    before = CodeDataset.open(str(made / "codes"))
    used = np.unique(before.shard(0).codes)
    assert 1 < len(used) < 64
    assert f"{len(used)} of 64 codes are used" in capsys.readouterr().out

    run_tokenize(made, "small", "small-codes")
    after = CodeDataset.open(str(made / "small-codes"))
    assert after.vocabulary == len(used)
    assert (used[after.shard(0).codes] == before.shard(0).codes).all()
    images = [
        VQGAN.from_pretrained(made / name).decode_codes(
            torch.from_numpy(codes.shard(0).codes[:, 0].astype(np.int64))
        )
        for name, codes in (("export", before), ("small", after))
    ]
    torch.testing.assert_close(images[0], images[1])


def test_codes_of_another_vqgan_and_a_folder_that_exists_are_refused(made: Path) -> None:
    run(made)
    with pytest.raises(UserError, match="was not written by"):
        run(made, model="small", out="smaller")
    with pytest.raises(UserError, match="small exists"):
        run(made)
