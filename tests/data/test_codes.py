import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from taming_dist.data.codes import (
    CodeDataset,
    CodeReader,
    CodeShard,
    codes_dtype,
    write_codes_manifest,
)
from taming_dist.errors import UserError

VOCABULARY, GRID = 32, (2, 3)


def shard(rows: range, views: int = 1, classes: bool = True, **facts: Any) -> CodeShard:
    known = {
        "vocab": VOCABULARY,
        "tokenizer": {"fingerprint": "f" * 64},
        "source": {"fingerprint": "e" * 64, "range": [rows.start, rows.stop], "bad": []},
        "preprocessing": {"size": 8},
    }
    numbers = np.arange(rows.start * views, rows.stop * views).reshape(-1, views, 1, 1)
    codes = np.broadcast_to(numbers % VOCABULARY, (len(rows), views, *GRID))
    return CodeShard(
        known | facts,
        codes=codes.astype(codes_dtype(facts.get("vocab", VOCABULARY))),
        sources=np.array(rows, dtype=np.int64),
        keys=[f"k{row}" for row in rows],
        classes=np.array(rows, dtype=np.int32) if classes else None,
    )


def write(folder: Path, *shards: CodeShard) -> Path:
    folder.mkdir(exist_ok=True)
    names = [f"codes-train-{number:06d}.tar" for number in range(len(shards))]
    for name, contents in zip(names, shards, strict=True):
        contents.save(folder / name)
    write_codes_manifest(folder, names, None)
    return folder


@pytest.fixture
def two_views(tmp_path: Path) -> Path:
    return write(tmp_path / "codes", shard(range(20), views=2), shard(range(20, 27), views=2))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = shard(range(5))
    written.save(tmp_path / "a.tar")
    read = CodeShard.open(tmp_path / "a.tar")
    assert np.array_equal(read.codes, written.codes)
    assert read.codes.dtype == np.uint16
    assert read.classes is not None
    assert read.classes.tolist() == list(range(5))
    assert read.sources.tolist() == list(range(5))
    assert read.keys == [f"k{row}" for row in range(5)]
    assert read.verify() is None


def test_codes_above_65536_are_stored_wider(tmp_path: Path) -> None:
    shard(range(5), vocab=65537).save(tmp_path / "a.tar")
    assert CodeShard.open(tmp_path / "a.tar").codes.dtype == np.int32


def test_bytes_depend_on_the_contents_only(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, shard(range(5)), shard(range(5, 7)))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_code_shard_is_one_sample_of_stock_webdataset(two_views: Path) -> None:
    url = str(two_views / "codes-train-000000.tar")
    (sample,) = wds.WebDataset(url, shardshuffle=False).decode()
    assert sample["codes.npy"].shape == (20, 2, *GRID)
    assert sample["json"]["columns"]["codes"]["shape"] == [20, 2, *GRID]
    assert sample["cls.npy"].tolist() == list(range(20))


def test_a_code_shard_is_plain_tar_with_arrays_that_numpy_can_map(two_views: Path) -> None:
    path = two_views / "codes-train-000001.tar"
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".codes.npy"))
        assert member.mtime == 0
    start = member.offset_data + 128  # the npy header
    codes = np.memmap(path, np.uint16, "r", start, (7, 2, *GRID))
    assert np.array_equal(codes, CodeShard.open(path).codes)
    assert start % 64 == 0


def test_a_data_set_knows_its_tokenizer_vocabulary_grid_and_views(two_views: Path) -> None:
    dataset = CodeDataset.open(str(two_views))
    assert dataset.tokenizer_fingerprint == "f" * 64
    assert (dataset.vocabulary, dataset.grid, dataset.views) == (VOCABULARY, GRID, 2)
    assert dataset.num_samples == 54
    assert dataset.classes_present
    assert dataset.num_classes == 27


def test_every_view_is_a_sample(two_views: Path) -> None:
    batches = list(CodeReader(CodeDataset.open(str(two_views)), micro_batch=8).epoch_batches())
    codes = torch.cat([batch.codes for batch in batches])
    classes = torch.cat([b.classes for b in batches if b.classes is not None])
    assert codes[:, 0, 0].tolist() == [number % VOCABULARY for number in range(54)]
    assert classes.tolist() == [number // 2 for number in range(54)]
    assert codes.dtype == torch.int64
    assert len(batches[-1]) == 54 % 8


def test_ranks_and_resumption_read_the_same_global_batches(two_views: Path) -> None:
    dataset = CodeDataset.open(str(two_views))

    def ids(world_size: int, start: int, count: int) -> list[list[int]]:
        readers = [
            CodeReader(
                dataset,
                seed=3,
                lanes=8,
                block=2,
                rank=r,
                world_size=world_size,
                micro_batch=8 // world_size,
            )  # fmt: skip
            for r in range(world_size)
        ]
        parts = [[b.ids for b in islice(r.batches(start), count)] for r in readers]
        return [torch.stack(step, dim=1).flatten().tolist() for step in zip(*parts, strict=True)]

    whole = ids(1, 0, 15)
    assert ids(4, 0, 15) == whole
    assert ids(2, 40, 10) == whole[5:]


def test_without_classes_there_are_none(tmp_path: Path) -> None:
    dataset = CodeDataset.open(str(write(tmp_path / "c", shard(range(9), classes=False))))
    batch = next(CodeReader(dataset, lanes=4, micro_batch=4).batches())
    assert batch.classes is None
    assert (dataset.classes_present, dataset.num_classes) == (False, 0)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tokenizer": {"fingerprint": "0"}}, "tokenizer"),
        ({"vocab": 64}, "vocab"),
        ({"views": 2}, "views"),
        ({"classes": False}, "only one of .* has classes"),
    ],
)
def test_shards_that_do_not_agree_are_refused(
    tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "c", shard(range(5)), shard(range(5, 9), **facts))
    with pytest.raises(UserError, match=rf"codes-train-000001.*{message}|{message}"):
        CodeDataset.open(str(folder))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2048])


def damage_header(path: Path) -> None:
    data = path.read_bytes().replace(b"'descr': '<u2'", b"'descr': '<u8'")
    path.write_bytes(data)


def damage_json(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"n": 7', b'"n": 8'))


@pytest.mark.parametrize("damage", [cut, damage_header, damage_json])
def test_a_damaged_shard_is_named(two_views: Path, damage: Callable[[Path], None]) -> None:
    path = two_views / "codes-train-000001.tar"
    damage(path)
    with pytest.raises(UserError, match=r"codes-train-000001\.tar (is damaged|has \d+ bytes)"):
        CodeDataset.open(str(two_views))


def test_a_code_outside_of_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    wrong = shard(range(9))
    codes = wrong.codes.copy()
    codes[3] = VOCABULARY
    folder = write(tmp_path / "c", CodeShard(wrong.facts, codes, wrong.sources, wrong.keys))
    with pytest.raises(UserError, match="a code outside of 0 .. 31"):
        list(CodeReader(CodeDataset.open(str(folder)), micro_batch=4).epoch_batches())
    assert "outside" in str(CodeShard.open(folder / "codes-train-000000.tar").verify())


def test_a_flipped_byte_is_found_by_its_hash(two_views: Path) -> None:
    path = two_views / "codes-train-000000.tar"
    with tarfile.open(path) as tar:
        start = next(m for m in tar if m.name.endswith(".codes.npy")).offset_data + 128
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\x07")
    assert CodeShard.open(path).verify() == "the column codes has another xxh3 than the json says"
