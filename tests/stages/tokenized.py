"""A first stage and the shards of the codes that it gives images."""

import io
import runpy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from taming_dist.models.quantizers import QuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.data.shard_files import writing_shards
from tests.tiny_models import tiny_config

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "tokenize_dataset.py"))["main"]
SAMPLES = 10


def tokenized(folder: Path, quantizer: QuantizerConfig, *more: str) -> None:
    """Leave an untrained VQGAN for 8 pixels, 2 of them per code, in `folder/v`, the shards of
    `SAMPLES` images in `folder/images` and those of their codes, which the tool makes with `more`
    of its arguments, in `folder/codes`."""
    torch.manual_seed(0)
    VQGAN(tiny_config(quantizer, latent_channels=32)).save_pretrained(folder / "v")
    with writing_shards(folder / "images", "train", 6) as write:
        for number in range(SAMPLES):
            out, draw = io.BytesIO(), np.random.default_rng(number)
            Image.fromarray(draw.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(out, "PNG")
            write(f"{number:04d}", {"png": out.getvalue()})
    given = ["--model", str(folder / "v"), "--shards", str(folder / "images")]
    given += ["--out", str(folder / "codes"), "--shard-samples", "6", "--batch", "4"]
    TOOL([*given, "--threads", "1", *more])
