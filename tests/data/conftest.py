"""What several tests of data need: small image shards, reading them without a process of its own,
and small code shards whose codes tell which sample they are."""

import gc
import io
import os
import resource
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from taming_dist.data.decoding import Filled
from taming_dist.data.fetching import Ticket
from taming_dist.data.reader import Reader
from taming_dist.data.slots import Rows
from taming_dist.formats.code_shards import CodeShard, codes_dtype, write_codes_manifest
from taming_dist.formats.objects import Boxes
from tests.data.shard_files import writing_shards


@lru_cache(maxsize=1024)
def encoded(number: int) -> bytes:
    """A small PNG whose red channel is its number."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    pixels[..., 0] = number % 256
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


@pytest.fixture(scope="session")
def image_bytes() -> Callable[[int], bytes]:
    """A small PNG by number."""
    return encoded


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Writes shards of numbered images."""

    def write(
        folder: Path,
        samples: int = 90,
        shard: int = 25,
        bad: Collection[int] = (),
        **columns: Callable[[int], bytes],
    ) -> Path:
        with writing_shards(folder, "train", shard) as write:
            for number in range(samples):
                image = b"no image" if number in bad else encoded(number)
                extra = {n.replace("_", "."): make(number) for n, make in columns.items()}
                write(f"{number:04d}", {"png": image, **extra})
        return folder

    return write


@pytest.fixture(scope="session")
def train_inline() -> Callable[..., list[tuple[Filled, Rows]]]:
    """What the process of a reader does for its first batches, without the process."""

    def read(
        reader: Reader, from_sample: int, count: int, threads: int = 2
    ) -> list[tuple[Filled, Rows]]:
        decoder = reader.decoder

        def fill(tickets: list[Ticket]) -> tuple[Filled, Rows]:
            rows = decoder.layout.rows(memoryview(bytearray(decoder.layout.bytes)))
            return decoder.fill(tickets, rows, replace=True), rows

        with ThreadPoolExecutor(threads) as reading, ThreadPoolExecutor(threads) as decoding:
            batches = islice(decoder.training(from_sample, reading), count)
            return list(decoding.map(fill, batches))

    return read


@pytest.fixture
def few_files() -> Iterator[int]:
    """Lowers the limit of open files, as `ulimit -n` does; gives how many more may be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    opened = {int(name) for name in os.listdir("/proc/self/fd")}
    spare = 60 + 2 * len(opened)  # two readers keep a third of the limit each
    free = (number for number in count() if number not in opened)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, spare, None)), limits[1]))
    yield spare
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Codes:
    """Makes code shards: sample k (image x view) is the grid of all k modulo the vocabulary."""

    vocabulary, grid = 32, (2, 3)

    @classmethod
    def shard(
        cls,
        rows: range,
        views: int = 1,
        classes: bool = True,
        conditions: int = 0,
        places: bool = False,
        **facts: Any,
    ) -> CodeShard:
        """`conditions`: the vocabulary of a second tokenizer, 0 for none. `places`: with
        coordinates, and k modulo 3 objects of category k, with flags k, in sample k."""
        known: dict[str, Any] = {
            "vocab": cls.vocabulary,
            "tokenizer": {"fingerprint": "f" * 64},
            "source": {"fingerprint": "e" * 64, "range": [rows.start, rows.stop], "bad": []},
            "preprocessing": {"size": 8},
        }
        if conditions:
            known["condition"] = {"fingerprint": "c" * 64, "vocab": conditions, "grid": [1, 2]}
        numbers = np.arange(rows.start * views, rows.stop * views).reshape(-1, views, 1, 1)
        codes = np.broadcast_to(numbers % cls.vocabulary, (len(rows), views, *cls.grid))
        second = np.broadcast_to(numbers % max(conditions, 1), (len(rows), views, 1, 2))
        samples = numbers.reshape(-1)
        shares = np.repeat(samples % 8 / 8, 5).astype(np.float32).reshape(len(rows), views, 5)
        categories = np.repeat(samples, samples % 3).astype(np.int32)
        flags = categories.astype(np.uint8) % 32
        boxes = np.repeat(categories % 8 / 8, 4).astype(np.float32).reshape(-1, 4)
        return CodeShard(
            known | facts,
            codes=codes.astype(codes_dtype(facts.get("vocab", cls.vocabulary))),
            sources=np.array(rows, dtype=np.int64),
            keys=[f"k{row}" for row in rows],
            classes=np.array(rows, dtype=np.int32) if classes else None,
            conditions=second.astype(codes_dtype(conditions)) if conditions else None,
            crops=shares if places else None,
            boxes=Boxes(boxes, categories, flags, np.cumsum(samples % 3)) if places else None,
        )

    @staticmethod
    def write(folder: Path, *shards: CodeShard) -> Path:
        """A folder of shards with its manifest."""
        folder.mkdir(exist_ok=True)
        names = [f"codes-train-{number:06d}.tar" for number in range(len(shards))]
        for name, contents in zip(names, shards, strict=True):
            contents.save(folder / name)
        write_codes_manifest(folder, names, None)
        return folder


@pytest.fixture
def codes() -> type[Codes]:
    return Codes


@pytest.fixture
def two_views(tmp_path: Path) -> Path:
    shards = [Codes.shard(r, views=2, places=True) for r in (range(20), range(20, 27))]
    return Codes.write(tmp_path / "codes", *shards)
