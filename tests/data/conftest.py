"""Small code shards whose codes tell which sample they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taming_dist.data.code_shards import CodeShard, codes_dtype, write_codes_manifest


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
        **facts: Any,
    ) -> CodeShard:
        """`conditions`: the vocabulary of a second tokenizer, 0 for none."""
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
        return CodeShard(
            known | facts,
            codes=codes.astype(codes_dtype(facts.get("vocab", cls.vocabulary))),
            sources=np.array(rows, dtype=np.int64),
            keys=[f"k{row}" for row in rows],
            classes=np.array(rows, dtype=np.int32) if classes else None,
            conditions=second.astype(codes_dtype(conditions)) if conditions else None,
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
    shards = Codes.shard(range(20), views=2), Codes.shard(range(20, 27), views=2)
    return Codes.write(tmp_path / "codes", *shards)
