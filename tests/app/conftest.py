"""Tiny exports that the page is tried with, and pictures to give it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.models.modalities import RGB, LabelMap
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.prior.schemes import Masked
from tests.tiny_models import save_transformer, save_vqgan

CODES, SIDE = 16, 16  # of the VQGAN of images, which has 2 pixels per code
GRID = SIDE // 2
LABELS = 5


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with VQGANs of images and of `labels`, and transformers: of three classes in
    `class`, of label maps in `seg`, and of the masked scheme."""
    folder = tmp_path_factory.mktemp("exports")
    vqgan = save_vqgan(folder / "vqgan", RGB(), CODES, SIDE)
    labels = save_vqgan(folder / "labels", LabelMap(LABELS), 8, SIDE)
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
