"""The commands of the multi-scale tokenizer and its prior on tiny images: what each of them leaves
for the next one."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.data.codes import CodeDataset
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from tests.data.shard_files import writing_shards

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("scale_runs.py")
SCALES, COUNT, CLASSES = [1, 2, 4, 8], 85, ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands have run."""
    folder = tmp_path_factory.mktemp("scales")
    with writing_shards(folder / "images", "images", 6, CLASSES) as write:
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            write(f"{number:02d}", {"png": file.getvalue(), "cls": str(number % 3).encode()})
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def test_codes_are_sequences_of_all_scales(folder: Path) -> None:
    codes, tokenizer = (
        CodeDataset.open(str(folder / "codes")),
        VQGAN.from_pretrained(folder / "outputs/tokenizer/export"),
    )
    assert codes.grid == tokenizer.config.code_shape(16, 16) == (COUNT,)
    assert codes.tokenizer_fingerprint == tokenizer.tokenizer_fingerprint


def test_the_prior_is_validated_scale_by_scale(folder: Path) -> None:
    lines = (folder / "outputs/prior/metrics.jsonl").read_text().splitlines()
    (found,) = [line for line in map(json.loads, lines) if "val/nll" in line]
    own = np.array(found["val/nll_by_scale"])
    assert len(own) == len(found["val/accuracy_by_scale"]) == len(SCALES)
    sizes = np.square(SCALES)
    assert (own * sizes).sum() / COUNT == pytest.approx(found["val/nll"], abs=1e-4)
    accuracy = (np.array(found["val/accuracy_by_scale"]) * sizes).sum() / COUNT
    assert accuracy == pytest.approx(found["val/accuracy"], abs=1e-4)
    evaluated = json.loads((folder / "evaluated/metrics.json").read_text())
    assert evaluated["val_nll_by_scale"] == pytest.approx(found["val/nll_by_scale"], abs=1e-4)
    assert list((folder / "outputs/prior").rglob("*.png"))  # previews


def test_samples_do_not_depend_on_how_many_are_made_at_a_time(folder: Path) -> None:
    names = [f"{number:06d}.png" for number in range(3)]
    together, alone, guided = (
        np.stack([np.asarray(Image.open(folder / out / name), np.int64) for name in names])
        for out in ("samples", "alone", "guided")
    )
    assert together.shape == (3, 16, 16, 3)
    assert np.abs(together - alone).max() <= 1  # where the decoder's rounding shows
    assert np.abs(together - guided).max() > 1
    trained = Transformer.from_pretrained(folder / "outputs/prior/export")
    assert trained.config.scheme.scales == SCALES
