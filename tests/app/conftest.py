"""Tiny exports that the page is tried with, and pictures to give it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.models.modalities import RGB, LabelMap, Modality
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.prior.schemes import Masked
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig

CODES, SIDE = 16, 16  # of the VQGAN of images, which has 2 pixels per code
GRID = SIDE // 2
LABELS = 5


def save_vqgan(folder: Path, modality: Modality, codes: int) -> VQGAN:
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


def save_transformer(folder: Path, vqgan: VQGAN, **settings: Any) -> None:
    """Export an untrained transformer on its codes."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "width": 8, "grid": [GRID, GRID]}
    known = {"vocabulary": CODES, "vqgan_fingerprint": vqgan.fingerprint}
    model = Transformer(TransformerConfig(**sizes | known | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with VQGANs of images and of `labels`, and transformers: of three classes in
    `class`, of label maps in `seg`, and of the masked scheme."""
    folder = tmp_path_factory.mktemp("exports")
    vqgan = save_vqgan(folder / "vqgan", RGB(), CODES)
    labels = save_vqgan(folder / "labels", LabelMap(LABELS), 8)
    save_transformer(folder / "class", vqgan, condition=ClassCondition(3))
    save_transformer(folder / "masked", vqgan, scheme=Masked(steps=4))
    condition = CodesCondition(labels.config.vocabulary, [GRID, GRID], labels.fingerprint)
    save_transformer(folder / "seg", vqgan, condition=condition)
    return folder


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of smooth noise."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((28, 22), Image.Resampling.BICUBIC).save(path)
    return path
