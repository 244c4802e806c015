"""A tiny tokenizer and image shards for it."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.manifest import resolve
from taming_dist.data.shards import ShardWriter
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.tokenization.job import Job
from taming_dist.tokenization.views import build_views
from taming_dist.tokenization.work import Worker, tokenize


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = VQGANConfig(
        quantizer=VectorQuantizerConfig(codes=16, dim=4, normalized=True),
        resolution=8,
        channels=32,
        multipliers=[1, 1],
        blocks=1,
        attention_resolutions=[],
        latent_channels=32,
    )
    folder = tmp_path_factory.mktemp("export")
    VQGAN(config).eval().save_pretrained(folder)
    return folder


def write_images(folder: Path, shards: Sequence[int]) -> Path:
    """Shards with so many images each; image k is the same in every folder."""
    with ShardWriter(folder, "train", 8) as writer:
        for number in range(8 * len(shards)):
            if number % 8 < shards[number // 8]:
                out = io.BytesIO()
                pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(out, "PNG")
                writer.write(f"{number:04d}", {"png": out.getvalue()})
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder of so many image shards of 8 images."""

    def make(shards: int) -> Path:
        return write_images(tmp_path_factory.mktemp("images"), [8] * shards)

    return make


Run = Callable[..., None]


@pytest.fixture
def run(model: Path) -> Run:
    """Tokenizes a folder of image shards as one worker."""

    def work(shards: Path, out: Path, worker: int = 0, count: int = 1) -> None:
        job = make_job(model, shards, out)
        tokenize(job, Worker(worker, count, 0), batch=4, threads=1, stale_s=1.0)

    return work


def make_job(model: Path, shards: Path, out: Path) -> Job:
    return Job(
        model=VQGAN.from_pretrained(model),
        condition_model=None,
        dataset=resolve(str(shards)),
        views=build_views("center", 8, 1, 0),
        size=8,
        precision="fp32",
        out=out,
        prefix="codes-train",
        shard_samples=6,
    )


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Shards and manifest of a folder; records and reports are not part of the data set."""

    def read(folder: Path) -> dict[str, bytes]:
        names = [*sorted(folder.glob("*.tar")), folder / "manifest.json"]
        return {path.name: path.read_bytes() for path in names if path.exists()}

    return read
