"""Shards on a web server and in an object store are read as if they lay here."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from taming_dist.data.codes import CodeDataset
from taming_dist.data.decoding import Filled
from taming_dist.data.images import Preprocess, RandomCrop
from taming_dist.data.reader import Reader, Reading
from taming_dist.data.slots import Rows
from taming_dist.errors import UserError
from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest, Shard, resolve, write_index
from taming_dist.formats.storage import StorageError
from tests.data.pictures import jpeg
from tests.data.shard_files import writing_shards

SAMPLES = 20


def write(folder: Path) -> Path:
    with writing_shards(folder, "train", 6) as write:
        for number in range(SAMPLES):
            write(f"{number:04d}", {"jpg": jpeg(number), "cls": b"%d" % number})
    return folder


Inline = Callable[..., list[tuple[Filled, Rows]]]
Found = list[tuple[list[str], np.ndarray]]


def reader(spec: Any) -> Reader:
    preprocess = Preprocess(8, RandomCrop(), flip=True)
    return Reader(resolve(spec), Reading(preprocess, micro_batch=4), lanes=4, block=3)


@pytest.fixture
def some_batches(train_inline: Inline) -> Callable[[Any], Found]:
    """Keys and images of a few batches, read in this process."""

    def read(spec: Any) -> Found:
        found = train_inline(reader(spec), 8, 4)
        return [(filled.keys, rows.columns["image"]) for filled, rows in found]

    return read


def assert_same(ones: Found, others: Found) -> None:
    for (keys, images), (other_keys, other_images) in zip(ones, others, strict=True):
        assert keys == other_keys
        assert np.array_equal(images, other_images)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    monkeypatch.setattr("taming_dist.formats.sources.time", clock)


def to_memory(folder: Path, bucket: str) -> str:
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/{bucket}/{path.name}", path.read_bytes())
    return f"memory://{bucket}"


def test_a_folder_braces_and_a_list_of_urls_read_as_the_files_do(
    server: Any, some_batches: Callable[[Any], Found]
) -> None:
    folder = write(server.folder / "set")
    here = some_batches(str(folder))
    url = f"{server.url}/set"
    names = [f"{url}/train-{number:06d}.tar" for number in range(4)]
    bucket = to_memory(folder, "readable")
    for spec in (
        url,
        f"{url}/train-{{000000..000003}}.tar",
        names,
        f"{url}?token=1",
        f"{bucket}/",
        f"{bucket}/*.tar",
    ):
        assert resolve(spec).fingerprint == resolve(str(folder)).fingerprint
        assert_same(some_batches(spec), here)


def test_a_manifest_here_may_name_shards_elsewhere(
    server: Any, tmp_path: Path, some_batches: Callable[[Any], Found]
) -> None:
    folder = write(server.folder / "set")
    known = Manifest.load(folder)
    shards = tuple(
        Shard(s.name, s.samples, s.bytes, s.xxh3_128, s.columns, f"{server.url}/set/{s.name}?t=1")
        for s in known.shards
    )
    (tmp_path / "index").mkdir()
    Manifest(IMAGES_FORMAT, shards).save(tmp_path / "index")
    for path in folder.glob("*.idx"):
        (tmp_path / "index" / path.name).write_bytes(path.read_bytes())
    assert_same(some_batches(str(tmp_path / "index")), some_batches(str(folder)))


def test_reading_goes_on_through_failures_and_ends_when_they_last(
    server: Any, hurried: None, some_batches: Callable[[Any], Found]
) -> None:
    here = some_batches(str(write(server.folder / "set")))
    remote = f"{server.url}/set"
    dataset = resolve(remote)  # the manifest is read before the troubles begin
    server.faults += ["reset", "503", "short", "500"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "resolve", lambda _: dataset)
        assert_same(some_batches(remote), here)
        assert not server.faults
        server.faults += ["503"] * 1000
        name = rf"{server.url}/set/train-00000\d\.tar"
        with pytest.raises(StorageError, match=rf"{name}.*503.*attempts"):
            some_batches(remote)


def test_the_process_that_decodes_reads_urls_itself(server: Any) -> None:
    source = reader(str(write(server.folder / "set")))
    here, there = source.batches(8), reader(f"{server.url}/set").batches(8)
    assert torch.equal(next(here).columns["image"], next(there).columns["image"])


def test_a_remote_shard_of_another_size_is_an_error_that_names_it(
    server: Any, some_batches: Callable[[Any], Found]
) -> None:
    folder = write(server.folder / "set")
    with open(folder / "train-000002.tar", "ab") as file:
        file.write(bytes(512))
    bucket = to_memory(folder, "grown")
    for spec in (f"{server.url}/set", bucket):
        with pytest.raises(StorageError, match=r"train-000002\.tar has .* manifest says .*verify"):
            some_batches(spec)


def test_mistakes_in_a_remote_spec_name_the_url_and_the_fix(server: Any) -> None:
    folder = write(server.folder / "set")
    (folder / "train-000003.tar.idx").unlink()
    write_index(folder / "train-000002.tar", np.arange(8) * 512)
    url = f"{server.url}/set"
    for spec, message in (
        (f"{server.url}/none", r"/none has no manifest\.json; run: .*index_shards.* --out DIR"),
        (f"{url}/other.tar", r"other\.tar is not in .*manifest\.json"),
        (f"{url}/*.tar", "lists no files"),
        (f"{url}/train-{{000000", "unbalanced"),
        (f"{url}/train-000003.tar", r"train-000003\.tar\.idx is missing.*--out DIR"),
        (f"{url}/train-000002.tar", r"train-000002\.tar\.idx does not match"),
    ):
        with pytest.raises(UserError, match=message):
            Reader(resolve(spec), Reading(Preprocess(8), 1)).dataset.read_index(0)
    (folder / "manifest.json").write_text("{" * 10**5)
    with pytest.raises(UserError, match=r"/set/manifest\.json is damaged"):
        resolve(url)


def test_what_is_large_is_no_manifest_and_no_index(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(server.folder / "set")
    monkeypatch.setattr("taming_dist.formats.manifest.MANIFEST_LIMIT", 100)
    with pytest.raises(StorageError, match="more than 100: not read"):
        resolve(f"{server.url}/set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "file:///etc/passwd"}, "cannot read file://"),
        ({"url": "pipe:cat /etc/passwd"}, "a pipe has no byte ranges"),
        ({"url": "/etc/passwd"}, "URL is invalid"),
        ({"url": "../a.tar"}, "URL is invalid"),
        ({"url": "memory::file:///etc/passwd"}, "cannot read"),
        ({"name": ".."}, "not a plain file name"),
        ({"name": "/etc/passwd"}, "not a plain file name"),
        ({"name": "a\0b"}, "not a plain file name"),
    ],
)
def test_a_manifest_from_elsewhere_reaches_no_file_of_this_machine(
    change: dict[str, str], message: str, server: Any
) -> None:
    entry = {"name": "a.tar", "samples": 1, "bytes": 2048, "xxh3_128": "0"} | change
    shard = Shard(**entry)
    Manifest(IMAGES_FORMAT, (shard,)).save(server.folder)
    with pytest.raises(UserError, match=message):
        resolve(server.url)


def test_code_shards_are_read_in_place_and_say_so(server: Any) -> None:
    record = json.loads((write(server.folder / "set") / "manifest.json").read_text())
    record["format"] = "taming_dist.codes.v1"
    (server.folder / "set" / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is a URL.*copy them to this machine"):
        CodeDataset.open(f"{server.url}/set")
