"""Every experiment of stage 1: its networks have the sizes of the original's, and it trains.

The sizes are counted here from the architecture on paper, layer by layer (arXiv 2012.09841, table
7), next to the numbers that were read off the original.
"""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.description import size
from taming_dist.models.discriminators import build_discriminator
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.interface import Config
from taming_dist.usage import conf_dir
from tests.data.shard_files import writing_shards

Compose = Callable[..., Config]
FILES = sorted((conf_dir() / "experiment").glob("*.yaml"))
STAGE_1 = [path.stem for path in FILES if "override /loss: tokens" not in path.read_text()]


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + outputs


def residual(inputs: int, outputs: int) -> int:
    shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
    convolutions = conv(inputs, outputs, 3) + conv(outputs, outputs, 3)
    return 2 * inputs + convolutions + 2 * outputs + shortcut


def attention(width: int) -> int:
    return 2 * width + 4 * conv(width, width, 1)


def middle(width: int) -> int:
    return 2 * residual(width, width) + attention(width)


def levels(config: VQGANConfig, blocks: int, order: list[int], width: int) -> tuple[int, int]:
    """Numbers of all levels in the order they are run, starting at a width; and the last width."""
    total = 0
    for place, level in enumerate(order):
        out = config.channels * config.multipliers[level]
        for _ in range(blocks):
            total += residual(width, out)
            width = out
            if config.resolution >> level in config.attention_resolutions:
                total += attention(out)
        if place < len(order) - 1:
            total += conv(out, out, 3)  # to the next resolution
    return total, width


def encoder(config: VQGANConfig) -> int:
    down = list(range(len(config.multipliers)))
    body, width = levels(config, config.blocks, down, config.channels)
    ends = conv(config.modality.channels, config.channels, 3) + 2 * width
    return body + ends + middle(width) + conv(width, config.latent_channels, 3)


def decoder(config: VQGANConfig) -> int:
    top = config.channels * config.multipliers[-1]
    up = list(range(len(config.multipliers)))[::-1]
    body, width = levels(config, config.blocks + 1, up, top)
    ends = conv(config.latent_channels, top, 3) + 2 * width
    return body + ends + middle(top) + conv(width, config.modality.channels, 3)


def numbers(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", STAGE_1)
def test_networks_have_the_sizes_that_the_architecture_gives(compose: Compose, name: str) -> None:
    config = compose(f"+experiment={name}").model
    with torch.device("meta"):
        model = VQGAN(config)
    assert numbers(model.encoder) == encoder(config)
    assert numbers(model.decoder) == decoder(config)


# encoder, decoder, codebook with both 1x1 convolutions; discriminator with running statistics
READ_OFF = {
    "imagenet": (29.298, 42.450, 0.394, 2.767),
    "faceshq": (29.298, 42.450, 0.394, 2.767),
    "custom": (29.298, 42.450, 0.394, 2.767),
}


@pytest.mark.parametrize("name", sorted(READ_OFF))
def test_f16_has_the_sizes_read_off_the_original(compose: Compose, name: str) -> None:
    config = compose(f"+experiment={name}")
    with torch.device("meta"):
        model = VQGAN(config.model)
        judge = build_discriminator(config.loss.discriminator, 3)
    between = sum(numbers(m) for m in (model.quantize, model.quant_conv, model.post_quant_conv))
    found = (size(model.encoder), size(model.decoder), f"{between / 1e6:.3f} M", size(judge))
    assert found == tuple(f"{value:.3f} M" for value in READ_OFF[name])


@pytest.mark.parametrize(("name", "millions"), [("llamagen_vq16", "72"), ("llamagen_vq8", "70")])
def test_llamagens_have_the_published_sizes(compose: Compose, name: str, millions: str) -> None:
    with torch.device("meta"):
        model = VQGAN(compose(f"+experiment={name}").model)
    assert f"{numbers(model) / 1e6:.0f}" == millions


@pytest.mark.parametrize(
    ("name", "codes", "grid"),
    [
        ("imagenet_16384", 16384, 16),
        ("imagenet_gumbel", 8192, 32),
        ("llamagen_vq16", 16384, 16),
        ("llamagen_vq8", 16384, 32),
    ],
)
def test_codebooks_and_grids_are_the_published_ones(
    compose: Compose, name: str, codes: int, grid: int
) -> None:
    config = compose(f"+experiment={name}")
    assert config.model.vocabulary == codes
    assert config.data.size // config.model.factor == grid


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with maps of all kinds."""
    folder = tmp_path_factory.mktemp("shards")
    draws = np.random.default_rng(0)
    with writing_shards(folder / "data", "images", 16) as write:
        for number in range(16):
            pixels = draws.integers(0, 256, (80, 64, 3), dtype=np.uint8)
            labels = draws.integers(0, 12, (80, 64), dtype=np.uint8)
            depth = draws.integers(0, 65536, (80, 64), dtype=np.uint16)
            files = {"jpg": pixels, "seg.png": labels, "depth.png": depth}
            files |= {"edges.png": labels, "lr.png": pixels[::4, ::4]}
            write(f"{number:02d}", {name: encoded(name, pixels) for name, pixels in files.items()})
    return folder


def encoded(name: str, pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if name == "jpg" else "PNG")
    return file.getvalue()


def run(folder: Path, name: str, *overrides: str) -> str:
    """Two real steps at laptop size; what is printed."""
    command = [sys.executable, "-m", "taming_dist.train", f"+experiment={name}", "+scale=laptop"]
    command += [f"data.train={folder / 'data'}", f"data.val={folder / 'data'}", "train.steps=2"]
    command += ["train.log_every=1", "data.global_batch=2", "data.micro_batch=2", "data.lanes=2"]
    command += ["log.wandb=disabled", "train.preview_images=2", f"run.dir={folder / name}"]
    command += ["train.evaluate_every=0"]  # FID's network is not on every machine
    done = subprocess.run(
        [*command, *overrides], cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_run(folder: Path, name: str, said: str) -> None:
    assert re.search(r"networks +generator .* M \(encoder .* M, decoder .* M, ", said)
    assert "step 2/2" in said
    assert VQGAN.from_pretrained(folder / name / "export").config.channels == 32
    assert list((folder / name / "images").glob("*.png"))


@pytest.mark.slow
def test_the_label_maps_of_flickr_train_by_its_experiment(shards: Path) -> None:
    """The others are as long and run among the slow tests."""
    said = run(shards, "flickr_segmentation")
    check_run(shards, "flickr_segmentation", said)
    assert "val/pixel_accuracy" in said
    assert "discriminator" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STAGE_1 if name != "flickr_segmentation"])
def test_every_experiment_of_stage_1_makes_two_steps(shards: Path, name: str) -> None:
    overrides = ["loss.terms.perceptual.weights=random", "loss.disc_start=1"]
    if name.endswith("_segmentation"):
        overrides = []
    elif name in ("imagenet_vqvae", "var_tiny"):  # without a discriminator
        overrides = overrides[:1]
    said = run(shards, name, *overrides)
    check_run(shards, name, said)
    assert ("train/gan_d" in said) == (len(overrides) == 2)
