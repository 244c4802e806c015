import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard


def test_a_data_set_knows_its_tokenizer_vocabulary_grid_and_views(two_views: Path) -> None:
    dataset = CodeDataset.open(str(two_views))
    assert dataset.tokenizer_fingerprint == "f" * 64
    assert (dataset.vocabulary, dataset.grid, dataset.views) == (32, (2, 3), 2)
    assert dataset.num_samples == 54
    assert dataset.classes_present
    assert dataset.num_classes == 27


def test_every_view_is_a_sample(two_views: Path) -> None:
    dataset = CodeDataset.open(str(two_views))
    batches = list(CodeReader(dataset, micro_batch=8, columns=["cls"]).epoch_batches())
    codes = torch.cat([batch.codes for batch in batches])
    classes = torch.cat([batch.columns["cls"] for batch in batches])
    assert codes[:, 0, 0].tolist() == [number % 32 for number in range(54)]
    assert classes.tolist() == [number // 2 for number in range(54)]
    assert codes.dtype == torch.int64
    assert len(batches[-1]) == 54 % 8


def test_a_batch_can_be_told_by_the_names_of_its_images(two_views: Path) -> None:
    dataset = CodeDataset.open(str(two_views))
    reader = CodeReader(dataset, lanes=9, block=2, micro_batch=8, columns=["cls"])
    batch = next(reader.batches(0))
    classes = batch.columns["cls"].tolist()  # image k is of class k
    expected = [f"k{number}" for number in sorted(classes)]
    assert reader.keys(batch) == expected


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (3, 2)])
def test_a_bounded_evaluation_reads_the_same_samples_on_any_ranks_in_any_batches(
    two_views: Path, world_size: int, micro_batch: int
) -> None:
    dataset, ids = CodeDataset.open(str(two_views)), []
    for rank in range(world_size):
        source = CodeReader(
            dataset,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            most_evaluated=18,
        )
        assert source.plan.num_evaluated == 18
        ids += [id for batch in source.epoch_batches() for id in batch.ids.tolist()]
    assert sorted(ids) == list(range(0, 54, 3))


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


def test_without_classes_there_are_none(codes: Any, tmp_path: Path) -> None:
    folder = codes.write(tmp_path / "codes", codes.shard(range(9), classes=False))
    dataset = CodeDataset.open(str(folder))
    with pytest.raises(UserError, match="codes have no column cls"):
        CodeReader(dataset, lanes=4, micro_batch=4, columns=["cls"])
    assert (dataset.classes_present, dataset.num_classes) == (False, 0)


def test_codes_of_a_condition_come_with_those_of_their_view(codes: Any, tmp_path: Path) -> None:
    shards = [codes.shard(rows, views=2, conditions=7) for rows in (range(6), range(6, 9))]
    dataset = CodeDataset.open(str(codes.write(tmp_path / "c", *shards)), in_memory=True)
    assert dataset.condition == {"fingerprint": "c" * 64, "vocab": 7, "grid": [1, 2]}
    reader = CodeReader(dataset, lanes=3, micro_batch=3, columns=["cond"])
    for batch in islice(reader.batches(), 20):
        assert batch.columns["cond"].tolist() == [[[int(id) % 7] * 2] for id in batch.ids]
        assert batch.codes[:, 1, 2].tolist() == [int(id) % 32 for id in batch.ids]


def test_coordinates_and_boxes_come_with_their_sample_if_they_are_asked_for(
    codes: Any, tmp_path: Path
) -> None:
    shards = [codes.shard(rows, views=2, places=True) for rows in (range(6), range(6, 9))]
    dataset = CodeDataset.open(str(codes.write(tmp_path / "c", *shards)))
    for batch in islice(CodeReader(dataset, lanes=3, micro_batch=3).batches(), 2):
        assert batch.columns.keys() == {"codes"}
    reader = CodeReader(dataset, lanes=3, micro_batch=3, columns=["crop", "boxes"])
    for batch in islice(reader.batches(), 20):
        columns, ids = batch.columns, batch.ids.tolist()
        assert columns.keys() == {"codes", "crop", "boxes", "box_class", "box_flags", "box_ends"}
        assert columns["crop"].tolist() == [[id % 8 / 8] * 5 for id in ids]
        expected = [[id] * (id % 3) for id in ids]
        found = columns["box_class"].tensor_split(columns["box_ends"][:-1])
        assert [part.tolist() for part in found] == expected
        assert columns["boxes"].tolist() == [[id % 8 / 8] * 4 for id in sum(expected, [])]
        assert torch.equal(columns["box_flags"], columns["box_class"])
        assert len(columns["boxes"]) == columns["box_ends"][-1]


def test_columns_that_the_shards_do_not_have_are_refused(codes: Any, tmp_path: Path) -> None:
    dataset = CodeDataset.open(str(codes.write(tmp_path / "codes", codes.shard(range(9)))))
    for column, option in (("crop", "--coordinates"), ("boxes", "--boxes")):
        with pytest.raises(UserError, match=f"codes have no column {column}: .* with {option}"):
            CodeReader(dataset, micro_batch=8, columns=[column])


def test_a_gathering_of_many_batches_changes_no_batch(
    two_views: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CodeReader(CodeDataset.open(str(two_views)), lanes=6, block=3, micro_batch=4)
    many = [batch.ids.tolist() for batch in islice(reader.batches(8), 40)]
    monkeypatch.setattr("taming_dist.data.codes.GATHERED_SAMPLES", 1)
    assert [batch.ids.tolist() for batch in islice(reader.batches(8), 40)] == many


@pytest.mark.parametrize("ids", [[40, 3, 53, 3, 0], []])
def test_samples_come_as_they_are_asked_for(two_views: Path, ids: list[int]) -> None:
    rows = CodeDataset.open(str(two_views)).take(np.array(ids, dtype=np.int64), ["cls"])
    assert rows["codes"][:, 1, 2].tolist() == [id % 32 for id in ids]
    assert rows["cls"].tolist() == [id // 2 for id in ids]


def test_shards_are_mapped_when_needed_few_stay_so_and_no_file_stays_open(
    codes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taming_dist.data.codes.OPEN_SHARDS", 3)
    shards = [codes.shard(range(4 * k, 4 * k + 4)) for k in range(12)]
    dataset = CodeDataset.open(str(codes.write(tmp_path / "c", *shards)))

    def mapped_files() -> int:
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        assert not any(link.startswith(str(tmp_path)) for link in links)
        return Path("/proc/self/maps").read_text(errors="replace").count(str(tmp_path))

    assert mapped_files() == 1
    for _ in range(2):
        rows = dataset.take(np.arange(48)[::-1])
        assert rows["codes"][:, 0, 0].tolist() == [number % 32 for number in range(47, -1, -1)]
    assert mapped_files() == 3


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tokenizer": {"fingerprint": "0"}}, "tokenizer is .*'0'.*make both with"),
        ({"vocab": 64}, "vocab is"),
        ({"views": 2}, "views is"),
        ({"classes": False}, ".*000000.* has a column cls but .*00000[01].* does not"),
        ({"conditions": 4}, "condition is|has a column cond"),
        ({"places": True}, "has a column crop"),
    ],
)
def test_shards_that_do_not_agree_are_refused(
    codes: Any, tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    first, other = codes.shard(range(5)), codes.shard(range(5, 9), **facts)
    together = codes.write(tmp_path / "c", first, other)
    apart = [codes.write(tmp_path / name, one) for name, one in (("a", first), ("b", other))]
    with pytest.raises(UserError, match=message):
        CodeDataset.open([str(path) for path in apart])
    with pytest.raises(UserError, match=message):
        CodeDataset.open(str(together)).take(np.arange(9))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2048])


def damage_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"'descr': '<u2'", b"'descr': '<i2'"))


def damage_json(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"n": 7', b'"n": 8'))


def change_a_code(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\x0c\x00\x0c\x00", b"\x0d\x00\x0c\x00"))


@pytest.mark.parametrize("damage", [cut, damage_header, damage_json, change_a_code])
def test_a_damaged_shard_is_refused_by_its_name(
    two_views: Path, damage: Callable[[Path], None]
) -> None:
    path = two_views / "codes-train-000001.tar"
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    with pytest.raises(UserError, match=r"codes-train-000001\.tar (is damaged|has \d+ bytes)"):
        list(CodeReader(CodeDataset.open(str(two_views)), micro_batch=8).epoch_batches())


def test_a_code_outside_of_the_vocabulary_is_an_error(codes: Any, tmp_path: Path) -> None:
    wrong = codes.shard(range(9))
    array = wrong.codes.copy()
    array[3] = 32
    folder = codes.write(tmp_path / "c", CodeShard(wrong.facts, array, wrong.sources, wrong.keys))
    with pytest.raises(UserError, match=r"codes outside the range 0 to 31"):
        CodeDataset.open(str(folder))


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ('"fingerprint": "' + "f" * 64, '"finge print": "' + "f" * 64),
        ('"vocab": 32', '"vocab": -2'),
        ('"vocab": 32', '"vocab": "3"'),
        ('"num_classes": 27', '"num_classes": []'),
    ],
)
def test_a_manifest_that_does_not_say_what_its_codes_are_is_refused(
    two_views: Path, said: str, changed: str
) -> None:
    path = two_views / "manifest.json"
    text = path.read_text()
    assert said in text
    path.write_text(text.replace(said, changed))
    with pytest.raises(UserError, match="does not (describe|state) its"):
        CodeDataset.open(str(two_views))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=3))
def test_a_fuzzed_manifest_gives_the_same_codes_or_a_refusal(
    two_views: Path, place: float, value: bytes
) -> None:
    path = two_views / "manifest.json"
    whole = path.read_bytes()
    at = int(place * len(whole))
    path.write_bytes(whole[:at] + value + whole[at + len(value) :])
    try:
        rows = CodeDataset.open(str(two_views)).take(np.arange(54), ["cls"])
        assert rows["codes"][:, 1, 1].tolist() == [number % 32 for number in range(54)]
        assert rows["cls"].tolist() == [n // 2 for n in range(54)]
    except UserError:
        pass
    finally:
        path.write_bytes(whole)


def test_more_shards_than_files_may_be_open_are_read_in_any_order(
    tmp_path: Path, codes: type, few_files: int
) -> None:
    shards = [codes.shard(range(k, k + 1)) for k in range(2 * few_files)]
    sets = [CodeDataset.open(str(codes.write(tmp_path / name, *shards))) for name in "ab"]
    ids = np.random.default_rng(0).permutation(2 * few_files)
    for _ in range(2):  # verified, then mapped again
        for dataset in sets:
            assert np.array_equal(dataset.take(ids)["codes"][:, 0, 0], ids % codes.vocabulary)
