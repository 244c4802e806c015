"""Tiny exports that the sampling command works with, and pictures to give it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from taming_dist.models.modalities import RGB
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.vqgan import VQGAN
from taming_dist.sample import main
from taming_dist.sampling.config import SampleConfig
from tests.tiny_models import save_transformer, save_vqgan

CODES, SIDE = 16, 8  # of the VQGAN of images, which has 2 pixels per code


def codes_condition(second: VQGAN, side: int = 4) -> CodesCondition:
    """The condition of a transformer that has learned codes of a second VQGAN."""
    return CodesCondition(second.config.vocabulary, [side, side], second.fingerprint)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VQGAN of images in `vqgan`, and transformers on its codes in `none` and, of
    three classes, in `class`."""
    folder = tmp_path_factory.mktemp("exports")
    vqgan = save_vqgan(folder / "vqgan", RGB(), CODES)
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
