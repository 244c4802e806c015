import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, open_verified
from taming_dist.formats.manifest import Manifest


def test_what_was_written_is_read_back(codes: Any, tmp_path: Path) -> None:
    written = codes.shard(range(5), views=2, conditions=7, places=True)
    entry = written.save(tmp_path / "a.tar")
    for read in (
        CodeShard.open(tmp_path / "a.tar"),
        open_verified(tmp_path / "a.tar", entry, True),
    ):
        assert read.arrays.keys() == written.arrays.keys()
        for name, array in read.arrays.items():
            assert np.array_equal(array, written.arrays[name])
            assert array.dtype == written.arrays[name].dtype
        assert list(read.keys) == written.keys
        assert read.verify() is None


def test_a_shard_of_no_images_and_no_objects_is_read_back(codes: Any, tmp_path: Path) -> None:
    entry = codes.shard(range(0), views=2, places=True).save(tmp_path / "a.tar")
    shard = open_verified(tmp_path / "a.tar", entry)
    assert shard.crops is not None
    assert shard.boxes is not None
    assert (shard.crops.shape, shard.boxes.places.shape) == ((0, 2, 5), (0, 4))


def test_flags_that_none_has_take_no_column(codes: Any, tmp_path: Path) -> None:
    shard = codes.shard(range(5), places=True)
    plain = replace(shard, boxes=replace(shard.boxes, flags=np.zeros_like(shard.boxes.flags)))
    entry = plain.save(tmp_path / "a.tar")
    assert "box_flags" not in entry.columns
    read = open_verified(tmp_path / "a.tar", entry)
    assert read.boxes is not None
    assert np.array_equal(read.boxes.flags, plain.boxes.flags)


@pytest.mark.parametrize(
    ("column", "array", "fault"),
    [
        ("crops", np.zeros((5, 2, 4), np.float32), r"crop of shape \(5, 2, 4\)"),
        ("crops", np.zeros((5, 2, 5)), "float64"),
        ("crops", np.full((5, 2, 5), 1.5, np.float32), "crop outside the range 0 to 1"),
        ("places", np.zeros((3, 4), np.float32), "box_class of shape"),
        ("flags", np.ones(3, np.uint8), r"box_flags of shape \(3,\)"),
        ("flags", np.full(9, 32, np.uint8), "box_flags with more than 5 bits"),
        ("ends", np.zeros(5, np.int64), "box_ends of shape"),
        ("ends", np.full(10, 9, np.int64), None),
        ("ends", np.full(10, 8, np.int64), "box_ends that do not partition 9 boxes"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(
    codes: Any, tmp_path: Path, column: str, array: np.ndarray, fault: str | None
) -> None:
    shard = codes.shard(range(5), views=2, places=True)
    if column == "crops":
        changed = replace(shard, crops=array)
    else:
        changed = replace(shard, boxes=replace(shard.boxes, **{column: array}))
    entry = changed.save(tmp_path / "a.tar")
    if fault is None:
        open_verified(tmp_path / "a.tar", entry)
        return
    with pytest.raises(UserError, match=fault):
        open_verified(tmp_path / "a.tar", entry)


def test_a_json_that_says_another_shape_is_refused(codes: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    codes.shard(range(5), views=2, places=True).save(path)
    data = path.read_bytes()
    assert data.count(b"    9,\n    4\n") == 1
    path.write_bytes(data.replace(b"    9,\n    4\n", b"    8,\n    4\n"))
    with pytest.raises(UserError, match=r"column boxes of shape \(9, 4\)"):
        CodeShard.open(path)


def test_codes_above_65536_are_stored_wider(codes: Any, tmp_path: Path) -> None:
    codes.shard(range(5), vocab=65537).save(tmp_path / "a.tar")
    assert CodeShard.open(tmp_path / "a.tar").codes.dtype == np.int32


def shaped(codes: Any, *shape: int) -> CodeShard:
    """A shard of 5 images of 2 views, whose codes have another shape."""
    numbers = np.arange(5 * 2 * np.prod(shape), dtype=np.uint16) % codes.vocabulary
    return replace(codes.shard(range(5), views=2), codes=numbers.reshape(5, 2, *shape))


@pytest.mark.parametrize("shape", [(3, 2, 4), (30,)])
def test_codes_of_several_grids_or_a_sequence_are_a_format_of_their_own(
    codes: Any, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    written = shaped(codes, *shape)
    entry = written.save(tmp_path / "a.tar")
    read = open_verified(tmp_path / "a.tar", entry)
    assert np.array_equal(read.codes, written.codes)
    assert read.facts["format"] == "taming_dist.codes.v2"
    assert read.facts["grid"] == list(shape)
    folder = codes.write(tmp_path / "codes", written, written)
    assert Manifest.load(folder).format == "taming_dist.codes.v2"
    dataset = CodeDataset.open(str(folder))
    assert dataset.grid == shape
    taken = dataset.samples(range(7, 13), ())["codes"].numpy()
    flat = written.codes.reshape(10, *shape)
    assert np.array_equal(taken, np.concatenate([flat[7:], flat[:3]]))


def test_a_grid_of_codes_has_the_bytes_that_it_always_had(codes: Any, tmp_path: Path) -> None:
    """So that folders of any age are read, and continued."""
    entry = codes.shard(range(5), views=2, conditions=7, places=True).save(tmp_path / "a.tar")
    assert entry.xxh3_128 == "fcc93478b5f97540cc92aa0c9f5bad09"
    assert CodeShard.open(tmp_path / "a.tar").facts["format"] == "taming_dist.codes.v1"


def test_a_shape_that_is_not_of_the_format_is_refused(codes: Any, tmp_path: Path) -> None:
    for shard in (codes.shard(range(5)), shaped(codes, 3, 2, 4)):
        shard.save(tmp_path / "a.tar")
        data = (tmp_path / "a.tar").read_bytes()
        other = {b"codes.v1": b"codes.v2", b"codes.v2": b"codes.v1"}
        here = next(name for name in other if name in data)
        (tmp_path / "a.tar").write_bytes(data.replace(here, other[here]))
        with pytest.raises(UserError, match=r"damaged \(format 'taming_dist.codes.v\d'\)"):
            CodeShard.open(tmp_path / "a.tar")


def test_bytes_depend_on_the_contents_only(codes: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        codes.write(tmp_path / name, codes.shard(range(5)), codes.shard(range(5, 7)))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_keys_of_any_text_but_a_line_break_come_back(codes: Any, tmp_path: Path) -> None:
    odd = ["\\xff", "a\u2028b", "\x1c", "", "x" * 200]
    shard = codes.shard(range(5))
    CodeShard(shard.facts, shard.codes, shard.sources, odd).save(tmp_path / "a.tar")
    assert list(CodeShard.open(tmp_path / "a.tar").keys) == odd
    with pytest.raises(UserError, match="line break"):
        CodeShard(shard.facts, shard.codes, shard.sources, ["a\nb"] * 5).save(tmp_path / "b.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_code_shard_is_one_sample_of_stock_webdataset(codes: Any, two_views: Path) -> None:
    url = str(two_views / "codes-train-000000.tar")
    (sample,) = wds.WebDataset(url, shardshuffle=False).decode()
    assert sample["codes.npy"].shape == (20, 2, *codes.grid)
    assert sample["json"]["columns"]["codes"]["shape"] == [20, 2, *codes.grid]
    assert sample["cls.npy"].tolist() == list(range(20))


def test_a_code_shard_is_plain_tar_with_arrays_that_numpy_can_map(
    codes: Any, two_views: Path
) -> None:
    path = two_views / "codes-train-000001.tar"
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".codes.npy"))
        assert member.mtime == 0
    start = member.offset_data + 128  # the npy header
    mapped = np.memmap(path, np.uint16, "r", start, (7, 2, *codes.grid))
    assert np.array_equal(mapped, CodeShard.open(path).codes)
    assert start % 64 == 0


def test_a_flipped_byte_is_found_by_its_hash(two_views: Path) -> None:
    path = two_views / "codes-train-000000.tar"
    with tarfile.open(path) as tar:
        start = next(m for m in tar if m.name.endswith(".codes.npy")).offset_data + 128
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\x07")
    fault = CodeShard.open(path).verify()
    assert fault == "the xxh3 of the column codes differs from the one in the json"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.floats(0, 1, exclude_max=True),
    value=st.binary(min_size=1, max_size=8),
    cut=st.booleans(),
)
def test_damage_anywhere_in_a_shard_is_refused_with_one_line(
    codes: Any, two_views: Path, place: float, value: bytes, cut: bool
) -> None:
    path = two_views / "codes-train-000001.tar"
    entry = Manifest.load(two_views).by_name[path.name]
    whole = path.read_bytes()
    at = int(place * len(whole))
    changed = whole[:at] if cut else whole[:at] + value + whole[at + len(value) :]
    copy = two_views / "copy.tar"
    copy.write_bytes(changed)
    if changed == whole:
        return
    with pytest.raises(UserError, match=r"copy\.tar is damaged"):
        open_verified(copy, entry)
