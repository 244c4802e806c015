"""Damaged bytes of every kind: an error or a replaced sample, never a crash, a hang, a wrong one.

An input is a whole file with a few bytes changed, cut, moved or repeated, by a seeded generator.
`make test` takes a small share of them, the slow form 10^5: 35 % tars, 35 % indexes and manifests,
30 % images.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.encoded import open_image
from taming_dist.formats.faults import BrokenData
from taming_dist.formats.manifest import Manifest, Shard, read_index
from taming_dist.formats.shards import read_sample, scan, walk
from taming_dist.formats.storage import open_source
from tests.data.pictures import jpeg
from tests.data.shard_files import writing_shards

SAMPLES = 6
# What numbers, tars and JSON are made of, and what would be a large size.
TOKENS = [b"\0", b"\xff", b"-1", b" ", b"9" * 11, bytes(512), b"[", b'"', b"{", b"null", b"ustar\0"]


def inputs(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test on `few` inputs, and in its slow form on `many`."""
    slow = pytest.param(many, marks=pytest.mark.slow, id="many")
    return pytest.mark.parametrize("count", [pytest.param(few, id="few"), slow])


def damaged(whole: bytes, count: int, same_size: bool = False) -> Iterator[bytes]:
    """`count` versions of some bytes, each with one to three damages."""
    random = np.random.default_rng(count)
    while count:
        data = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            (overwrite if same_size else mutate)(data, random)
        if data != whole:
            count -= 1
            yield bytes(data)


def overwrite(data: bytearray, random: np.random.Generator) -> None:
    """As `mutate`, but the size stays. Half of the copies go from block to block, as of a disk."""
    at, source = (int(place) for place in random.integers(len(data), size=2))
    length = int(2 ** random.uniform(0, 11))
    kind = random.integers(4)
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        data[at : at + 8] = random.bytes(8)[: len(data) - at]
    else:
        if kind == 2:
            at, source, length = (-(-number // 512) * 512 for number in (at, source, length))
        length = max(0, min(length, len(data) - at, len(data) - source))
        data[at : at + length] = data[source : source + length]


def mutate(data: bytearray, random: np.random.Generator) -> None:
    kind, at = random.integers(6), int(random.integers(len(data) + 1))
    length = int(2 ** random.uniform(0, 11))
    token = TOKENS[random.integers(len(TOKENS))]
    if kind == 0 and at < len(data):
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        data[at : at + len(token)] = token
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        source = int(random.integers(len(data) + 1))
        data[at:at] = data[source : source + length]
    else:
        data[at : at + 8] = random.bytes(8)


@dataclass(frozen=True)
class Whole:
    """A shard before it is damaged."""

    path: Path
    data: bytes
    entry: Shard
    offsets: list[int]
    samples: list[dict[str, bytes]]

    def sample(self, data: bytes, number: int) -> dict[str, bytes]:
        return read_sample(data[self.offsets[number] : self.offsets[number + 1]])[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with writing_shards(folder, "train", SAMPLES, classes=("a", "b")) as write:
        for number in range(SAMPLES):
            write(f"k/{number}", {"jpg": jpeg(number, (4, 4)), "cls": b"%d" % number})
    path = folder / "train-000000.tar"
    data, (entry, offsets) = path.read_bytes(), scan(path)
    pairs = itertools.pairwise(offsets.tolist())
    samples = [read_sample(data[start:end])[1] for start, end in pairs]
    return Whole(path, data, entry, offsets.tolist(), samples)


@inputs(500, 20_000)
def test_a_damaged_tar_is_refused_or_every_file_of_it_is_seen(
    count: int, whole: Whole, tmp_path: Path
) -> None:
    path, refused = tmp_path / "damaged.tar", 0
    for data in damaged(whole.data, count):
        path.write_bytes(data)
        try:
            entry, offsets = scan(path)
        except UserError:
            refused += 1
            continue
        names = [member.name for member in walk(memoryview(data))]
        assert entry.samples == len(offsets) - 1 > 0
        assert sum(entry.columns.values()) <= len(names)
        # Python's own reader stops without a word at what it does not understand.
        with tarfile.open(path) as tar:
            theirs = [member.name for member in tar if member.isreg()]
        assert theirs == names[: len(theirs)]
    assert refused > count / 2


@inputs(500, 15_000)
def test_where_no_image_was_damaged_a_damaged_tar_gives_it_back_or_refuses(
    count: int, whole: Whole
) -> None:
    """Of the contents of a file the tar has no sum; headers and places are what is tested here."""
    contents = np.zeros(len(whole.data), dtype=bool)
    for member in walk(memoryview(whole.data)):
        contents[member.start : member.start + member.size] = True
    before = np.frombuffer(whole.data, dtype=np.uint8)
    broken = 0
    for data in damaged(whole.data, count, same_size=True):
        touched = (np.frombuffer(data, dtype=np.uint8) != before) & contents
        for number in range(SAMPLES):
            try:
                files = whole.sample(data, number)
            except BrokenData:
                broken += 1
                continue
            if not touched[whole.offsets[number] : whole.offsets[number + 1]].any():
                # A header whose sum still fits may hide or rename a file: whoever needs it then
                # finds it missing.
                right = whole.samples[number]
                assert all(files.get(column, right[column]) == right[column] for column in right)
    assert broken > count / 4


@inputs(500, 20_000)
def test_a_damaged_index_is_refused_or_gives_only_files_of_the_right_sample(
    count: int, whole: Whole, tmp_path: Path
) -> None:
    index, refused = tmp_path / "damaged.idx", 0
    for data in damaged(whole.path.with_suffix(".tar.idx").read_bytes(), count):
        index.write_bytes(data)
        try:
            offsets = read_index(str(whole.path), whole.entry, str(index)).tolist()
        except UserError:
            refused += 1
            continue
        source = open_source(str(whole.path), whole.entry.bytes)
        for number, (start, end) in enumerate(itertools.pairwise(offsets)):
            try:
                files = read_sample(source.read(start, end - start))[1]
            except BrokenData:
                continue
            assert files.items() <= whole.samples[number].items()
    assert refused > count / 2


@inputs(300, 15_000)
def test_a_damaged_manifest_is_refused_or_names_the_same_shards(
    count: int, whole: Whole, tmp_path: Path
) -> None:
    """Names of classes and what a tool noted of itself are under no sum."""
    known = Manifest.load(whole.path.parent)
    for data in damaged((whole.path.parent / "manifest.json").read_bytes(), count):
        (tmp_path / "manifest.json").write_bytes(data)
        try:
            found = Manifest.load(tmp_path)
        except UserError:
            continue
        assert found.shards == known.shards


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@inputs(100, 10_000)
def test_a_damaged_image_is_refused_or_has_a_shape_within_the_limits(
    count: int, format: str
) -> None:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format, progressive=True)
    refused = 0
    for data in damaged(out.getvalue(), count):
        try:
            found = open_image(data, max_pixels=2**16).pixels()
        except BrokenData:
            refused += 1
            continue
        assert found.dtype == np.uint8
        assert found.ndim == found.shape[2] == 3
        assert found.shape[0] * found.shape[1] <= 2**16
    assert refused > count / 20


@pytest.mark.parametrize(
    "record",
    [None, [], 3, {}, {"format": 1, "shards": 3}, {"format": "x", "shards": [[]]}],
)
def test_json_of_another_kind_is_no_manifest(record: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)
