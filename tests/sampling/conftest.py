"""Tiny exports that the sampling command works with, and pictures to give it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.models.modalities import RGB, Modality
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.sample import main
from taming_dist.sampling.config import SampleConfig

CODES, SIDE = 16, 8  # of the VQGAN of images, which has 2 pixels per code


def save_vqgan(folder: Path, modality: Modality, codes: int = CODES) -> VQGAN:
    """Export an untrained VQGAN of 2 pixels per code whose pictures use many of its codes."""
    torch.manual_seed(codes)
    config = VQGANConfig(
        modality=modality,
        quantizer=VectorQuantizerConfig(codes=codes, dim=4, normalized=True),
        resolution=SIDE,
        channels=32,
        multipliers=[1, 1],
        blocks=1,
        attention_resolutions=[],
        latent_channels=32,
    )
    model = VQGAN(config).eval()
    model.save_pretrained(folder)
    return model


def save_transformer(folder: Path, vqgan: VQGAN, **settings: Any) -> Path:
    """Export an untrained transformer on the codes of images of 8 x 8 pixels."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "width": 8, "grid": [4, 4]}
    known = {"vocabulary": CODES, "vqgan_fingerprint": vqgan.fingerprint}
    model = Transformer(TransformerConfig(**sizes | known | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    model.save_pretrained(folder)
    return folder


def codes_condition(second: VQGAN, side: int = 4) -> CodesCondition:
    """The condition of a transformer that has learned codes of a second VQGAN."""
    return CodesCondition(second.config.vocabulary, [side, side], second.fingerprint)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VQGAN of images in `vqgan`, and transformers on its codes in `none` and, of
    three classes, in `class`."""
    folder = tmp_path_factory.mktemp("exports")
    vqgan = save_vqgan(folder / "vqgan", RGB())
    save_transformer(folder / "none", vqgan)
    save_transformer(folder / "class", vqgan, condition=ClassCondition(3))
    return folder


Asked = Callable[..., SampleConfig]


@pytest.fixture
def asked(exports: Path, tmp_path: Path) -> Asked:
    """A command with the exports, writing to `out`; without a transformer it is that in `none`."""

    def config(**settings: Any) -> SampleConfig:
        usual = {"transformer": exports / "none", "vqgan": exports / "vqgan", "out": tmp_path / "o"}
        values = {name: str(value) for name, value in usual.items()} | settings
        values = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
        return SampleConfig(**values)

    return config


Sample = Callable[..., Path]


@pytest.fixture
def sample(exports: Path, tmp_path: Path) -> Sample:
    """Samples 7 images with the settings that are given into a folder of tmp_path; gives it."""

    def run(name: str = "out", kind: str = "class", **settings: Any) -> Path:
        given: dict[str, Any] = {}
        if "from_" not in settings:
            given = {"transformer": str(exports / kind), "vqgan": str(exports / "vqgan")}
            given |= {"n": 7, "batch": 2}
        main(SampleConfig(**{**given, "out": str(tmp_path / name), **settings}))
        return tmp_path / name

    return run


def record(out: Path) -> dict[str, Any]:
    """What samples.json of a run says."""
    return json.loads((out / "samples.json").read_text())


def photograph(path: Path, seed: int = 0, size: tuple[int, int] = (11, 14)) -> Path:
    """A picture of smooth noise, [h, w] pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def grey_map(path: Path, pixels: np.ndarray) -> Path:
    """A PNG with one channel of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
