"""A first stage, shards of the codes that it gives images, a transformer that learns them."""

import io
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.models.prior.conditions import Unconditional
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import QuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.training.clock import Clock
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


class Learned(NamedTuple):
    """A recipe after 15 steps on a batch, and what it measures of that before and after them."""

    recipe: Any
    batch: Any
    before: float
    after: float


def learned(folder: Path, vqgan: VQGAN, scheme: Any, code_recipe: Callable[..., Any]) -> Learned:
    """Train a transformer of a scheme, without a condition, on `folder/codes`."""
    dataset = CodeDataset.open(str(folder / "codes"))
    blank = TransformerConfig(0, [], condition=Unconditional(), scheme=scheme)
    fitted = blank.fitted(dataset, "codes")
    names = ("vocabulary", "grid", "scheme", "condition", "vqgan_fingerprint")
    recipe = code_recipe(lr=1e-2, parts={n: getattr(fitted, n) for n in names}, vqgan=vqgan)
    batch = next(CodeReader(dataset, lanes=1, block=1, micro_batch=2).batches())
    measure = recipe.network.scheme.measure
    before = recipe.validate([(batch, True)])[measure]
    for step in range(15):
        list(recipe.train_step([batch], Clock(2, 15, images=2 * step)))
    return Learned(recipe, batch, before, recipe.validate([(batch, True)])[measure])
