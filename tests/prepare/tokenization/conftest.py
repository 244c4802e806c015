"""A tiny tokenizer and image shards for it."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.engine.workers import Worker
from taming_dist.formats.manifest import resolve
from taming_dist.formats.npy import to_npy
from taming_dist.models.modalities import RGB, LabelMap
from taming_dist.models.vqgan import VQGAN
from taming_dist.prepare.tokenization.job import Job
from taming_dist.prepare.tokenization.texts import open_texts
from taming_dist.prepare.tokenization.views import build_views
from taming_dist.prepare.tokenization.work import tokenize
from tests.data.shard_files import writing_shards
from tests.tiny_models import save_vqgan


def export(folder: Path, modality: RGB | LabelMap, codes: int) -> Path:
    """An untrained VQGAN of 2 pixels per code."""
    save_vqgan(folder, modality, codes)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("export"), RGB(), 16)


@pytest.fixture(scope="session")
def condition_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQGAN of label maps with 3 classes."""
    return export(tmp_path_factory.mktemp("condition"), LabelMap(3), 12)


def write_images(folder: Path, shards: Sequence[int]) -> Path:
    """Shards with so many images each; image k is the same in every folder."""
    with writing_shards(folder, "train", 8) as write:
        for number in range(8 * len(shards)):
            if number % 8 < shards[number // 8]:
                out = io.BytesIO()
                pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(out, "PNG")
                members = {"png": out.getvalue(), "seg.png": label_map(number)}
                members["txt.npy"] = to_npy(text(number))
                write(f"{number:04d}", members)
    return folder


def text(number: int) -> np.ndarray:
    """The embedding of a text of 1 to 3 tokens, out of 3."""
    found = np.random.default_rng(number).normal(size=(3, 4)).astype(np.float16)
    found[1 + number % 3 :] = 0
    return found


def label_map(number: int) -> bytes:
    """Classes 0 to 2, as large as the images."""
    out = io.BytesIO()
    labels = np.random.default_rng(number).integers(0, 3, (8, 9), dtype=np.uint8)
    Image.fromarray(labels).save(out, "PNG")
    return out.getvalue()


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
        texts=open_texts(resolve(str(shards)), "txt.npy", None, None),
    )


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Shards and manifest of a folder; records and reports are not part of the data set."""

    def read(folder: Path) -> dict[str, bytes]:
        names = [*sorted(folder.glob("*.tar")), folder / "manifest.json"]
        return {path.name: path.read_bytes() for path in names if path.exists()}

    return read
