"""Small folders of image shards for tests."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest
from taming_dist.formats.shards import write_shard

Write = Callable[[str, Mapping[str, bytes]], None]


@contextmanager
def writing_shards(
    folder: Path, prefix: str, shard_samples: int, classes: tuple[str, ...] | None = None
) -> Iterator[Write]:
    """Give a function that takes samples, a key and its files by extension; then write them all."""
    samples: list[tuple[str, Mapping[str, bytes]]] = []
    yield lambda key, files: samples.append((key, files))
    folder.mkdir(parents=True, exist_ok=True)
    shards = tuple(
        write_shard(
            folder / f"{prefix}-{start // shard_samples:06d}.tar",
            samples[start : start + shard_samples],
        )
        for start in range(0, len(samples), shard_samples)
    )
    Manifest(IMAGES_FORMAT, shards, classes).save(folder)


def write_noise(folder: Path, count: int, side: int) -> None:
    """One shard of so many square pictures of noise, the same each time."""
    with writing_shards(folder, "images", count) as write:
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(noise).save(file, "PNG")
            write(f"{number}", {"png": file.getvalue()})
