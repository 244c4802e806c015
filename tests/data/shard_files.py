"""Small folders of image shards for tests."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
