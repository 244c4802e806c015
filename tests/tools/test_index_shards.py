import io
import runpy
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset as wds
from PIL import Image

from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Manifest, fingerprint, resolve

TOOLS = Path(__file__).parents[2] / "tools"
index_shards = runpy.run_path(str(TOOLS / "index_shards.py"))["main"]
verify_shards = runpy.run_path(str(TOOLS / "verify_shards.py"))["main"]


def foreign(path: Path, first: int, count: int = 4) -> Path:
    path.parent.mkdir(exist_ok=True)
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    with wds.TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            writer.write({"__key__": f"{number:05d}", "jpg": out.getvalue(), "cls": number})
    return path


def test_shards_of_the_stock_writer_are_read_after_one_pass(tmp_path: Path) -> None:
    paths = [foreign(tmp_path / f"{number}.tar", number * 4) for number in range(3)]
    index_shards([str(path) for path in paths])
    reader = Reader(resolve(f"{tmp_path}/*.tar"), Reading(Preprocess(8), 5))
    batches = list(reader.epoch_batches())
    classes = [cls for b in batches if b.classes is not None for cls in b.classes.tolist()]
    assert classes == list(range(12))
    assert [key for batch in batches for key in batch.keys] == [f"{n:05d}" for n in range(12)]


def test_a_folder_can_be_named_and_shards_can_be_added(tmp_path: Path) -> None:
    foreign(tmp_path / "b.tar", 4)
    index_shards([str(tmp_path)])
    index_shards([str(foreign(tmp_path / "a.tar", 0))])
    assert [shard.name for shard in Manifest.load(tmp_path).shards] == ["a.tar", "b.tar"]
    (tmp_path / "b.tar").unlink()
    index_shards([str(tmp_path / "a.tar")])
    assert [shard.name for shard in Manifest.load(tmp_path).shards] == ["a.tar"]


def test_a_damaged_shard_is_named_and_its_folder_gets_no_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "a.tar", 0)
    cut = foreign(tmp_path / "b.tar", 4)
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(UserError, match="1 shard cannot be used, for the reasons above"):
        index_shards([str(tmp_path)])
    assert "b.tar is damaged" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()


def test_missing_files_and_empty_folders_are_mistakes(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "x.tar", "no such file"), (tmp_path, "no tar files")):
        with pytest.raises(UserError, match=message):
            index_shards([str(path)])


def remote(server: Any, folder: str, count: int = 3) -> list[str]:
    for number in range(count):
        foreign(server.folder / folder / f"{number}.tar", number * 4)
    return [f"{server.url}/{folder}/{number}.tar?token=x" for number in range(count)]


def test_shards_on_a_server_are_indexed_here_and_read_there(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = remote(server, "set")
    index_shards([f"{server.url}/set/{{0..2}}.tar?token=x", "--out", str(tmp_path / "index")])
    out = capsys.readouterr().out
    assert f"{server.url}/set/2.tar: 4 samples" in out
    assert "token" not in out
    assert [shard.url for shard in Manifest.load(tmp_path / "index").shards] == urls
    reader = Reader(resolve(str(tmp_path / "index")), Reading(Preprocess(8), 5))
    assert [key for b in reader.epoch_batches() for key in b.keys] == [
        f"{n:05d}" for n in range(12)
    ]
    assert sorted(path.suffix for path in (tmp_path / "index").iterdir()) == [".idx"] * 3 + [
        ".json"
    ]
    verify_shards([str(tmp_path / "index")])
    index_shards([str(server.folder / "set")])
    verify_shards([f"{server.url}/set"])
    assert capsys.readouterr().out.count("3 shards, 12 samples, all as") == 2


def test_a_store_is_listed_and_several_processes_find_the_same(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for number in range(2):
        path = foreign(tmp_path / "set" / f"{number}.tar", number * 4)
        store.pipe_file(f"/foreign/{path.name}", path.read_bytes())
    index_shards(["memory://foreign", "--out", str(tmp_path / "one")])
    index_shards(["memory://foreign/*.tar", "--out", str(tmp_path / "two")])
    index_shards([str(tmp_path / "set"), "--workers", "2"])
    one, two, three = (Manifest.load(tmp_path / name) for name in ("one", "two", "set"))
    assert one == two
    assert fingerprint(one.shards) == fingerprint(three.shards)
    with pytest.raises(UserError, match="no tar files there"):
        index_shards(["memory://none", "--out", str(tmp_path / "one")])


def test_remote_damage_is_found(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote(server, "set")
    path = server.folder / "set" / "1.tar"
    whole = path.read_bytes()
    index_shards([str(server.folder / "set")])
    path.write_bytes(whole[:600] + b"x" + whole[601:])
    with pytest.raises(UserError, match="1 of 3 shards in http://.*/set cannot be used"):
        verify_shards([f"{server.url}/set"])
    path.write_bytes(whole[:1500])
    with pytest.raises(UserError, match="1 of 3 shards in http://.*/set cannot be used"):
        verify_shards([f"{server.url}/set"])
    out = capsys.readouterr().out
    assert f"{server.url}/set/1.tar has contents that differ" in out
    assert f"{server.url}/set/1.tar has 1500 bytes" in out
    with pytest.raises(UserError, match="1 shard cannot be used, for the reasons above"):
        index_shards([f"{server.url}/set/1.tar", "--out", str(tmp_path / "index")])
    assert f"{server.url}/set/1.tar is damaged" in capsys.readouterr().out
    assert not list((tmp_path / "index").iterdir())


def test_where_an_index_goes_is_said_for_urls_and_only_for_them(
    server: Any, tmp_path: Path
) -> None:
    urls = remote(server, "a", 1) + remote(server, "b", 1)
    out = ["--out", str(tmp_path / "index")]
    for arguments, message in (
        (urls, "--out DIR is for URLs"),
        ([str(server.folder / "a"), *out], "--out DIR is for URLs"),
        ([*urls, *out], r"a/0\.tar and .*b/0\.tar have the same name"),
        ([f"{server.url}/a", *out], "lists no files"),
        (["pipe:cat a.tar", *out], "a pipe has no byte ranges"),
        ([urls[0], *out, "--workers", "0"], "--workers: '0' is invalid: use a whole"),
    ):
        with pytest.raises(UserError, match=message):
            index_shards(arguments)
    assert not (tmp_path / "index").exists()
