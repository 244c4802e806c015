import errno
import logging
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from taming_dist.errors import UserError
from taming_dist.formats.storage import (
    MissingFile,
    Patience,
    StorageError,
    beside,
    copy_in_sequence,
    fetch,
    folder_of,
    local_copy,
    matching,
    open_source,
    shown,
)

HURRIED = Patience(attempts=4, first_wait_s=0.001, timeout_s=0.3)
CONTENTS = bytes(range(256)) * 8


class TroubledStore(MemoryFileSystem):
    """An object store that fails as told."""

    protocol = "troubled"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    faults: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("troubled://").strip("/")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "error":
            raise RuntimeError("slow down")
        if fault == "denied":
            raise PermissionError("who are you?")
        data = super().cat_file(path, None if fault == "whole" else start, end, **kwargs)
        return data[:-1] if fault == "short" else data


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    fsspec.register_implementation("troubled", TroubledStore, clobber=True)
    monkeypatch.setattr("taming_dist.formats.locations.SCHEMES", ("http", "troubled"))
    system = fsspec.filesystem("troubled")
    system.pipe_file("/bucket/file", CONTENTS)
    system.faults.clear()
    return system


@pytest.fixture
def bucket(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of S3, behind which is the web server."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    (server.folder / "bucket").mkdir()
    (server.folder / "bucket" / "file").write_bytes(CONTENTS)
    yield "s3://bucket"
    S3FileSystem.clear_instance_cache()


def location_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    if kind == "memory":
        fsspec.filesystem("memory").pipe_file("/bucket/file", CONTENTS)
        return "memory://bucket/file"
    if kind == "http":
        server = request.getfixturevalue("server")
        (server.folder / "file").write_bytes(CONTENTS)
        return f"{server.url}/file"
    (folder / "file").write_bytes(CONTENTS)
    return str(folder / "file")


@pytest.mark.parametrize("kind", ["local", "http", "memory"])
def test_any_range_of_a_file_can_be_read_wherever_it_lies(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    location = location_of(kind, tmp_path, request)
    source = open_source(location, len(CONTENTS))
    assert source.size() == len(CONTENTS)
    for start, length in ((0, 1), (7, 500), (2047, 1), (0, 2048), (9, 0)):
        assert source.read(start, length) == CONTENTS[start : start + length]
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: again.read(start, 3), range(0, 2000, 100)))
    assert found == [CONTENTS[start : start + 3] for start in range(0, 2000, 100)]
    assert fetch(location, 2048) == CONTENTS
    with pytest.raises(StorageError, match="more than 2047"):
        fetch(location, 2047)
    with local_copy(location, tmp_path) as path:
        assert path.read_bytes() == CONTENTS
    assert path.exists() == (kind == "local")


@pytest.mark.parametrize("kind", ["local", "http", "memory"])
def test_another_size_or_an_end_too_early_is_an_error_at_once(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    location = location_of(kind, tmp_path, request)
    with pytest.raises(StorageError, match=r"file has 2048 bytes .* says 2050: .*verify_shards"):
        open_source(location, 2050, HURRIED).read(0, 5)
    for start in (2040, 4096):
        with pytest.raises(StorageError, match="file (ends before byte|cannot be read: .*bytes)"):
            open_source(location, None, HURRIED).read(start, 100)
    with pytest.raises(MissingFile, match="file-not is missing"):
        open_source(f"{location}-not", None, HURRIED).read(0, 5)


@pytest.mark.parametrize("fault", ["reset", "500", "503", "429", "short", "stall", "trickle"])
def test_a_server_that_fails_in_passing_is_asked_again(
    fault: str, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (server.folder / "file").write_bytes(CONTENTS)
    server.faults += [fault, fault]
    with caplog.at_level(logging.WARNING):
        assert open_source(f"{server.url}/file", 2048, HURRIED).read(5, 900) == CONTENTS[5:905]
    assert server.requests["file"] == 3
    said = [record.getMessage() for record in caplog.records]  # readers of other tests may speak
    assert sum(f"{server.url}/file" in message for message in said) == 2, said
    assert "attempt 3 of 4" in caplog.text


def test_waits_grow_and_end_in_one_line_that_names_the_url(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr("taming_dist.formats.sources.time", clock)
    server.faults += ["503"] * 9
    with pytest.raises(StorageError) as caught:
        open_source(f"{server.url}/a.tar?signature=secret", None, Patience(5, 1.0, 2.0)).read(0, 9)
    text = str(caught.value)
    assert text.startswith(f"{server.url}/a.tar cannot be read: the server answers 503")
    assert "\n" not in text
    assert "secret" not in text
    assert server.requests["a.tar"] == 5
    assert all(2**k / 2 <= wait <= 2**k for k, wait in enumerate(waits))
    assert len(waits) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("whole", "ignores byte ranges.*data.streaming=true"),
        ("unnamed", "does not say what it is"),
        ("gzip", "does not say what it is"),
        ("grown", "has 2049 bytes but its manifest says 2048"),
        ("403", "answers 403"),
        ("chunked", "does not say what it is"),
    ],
)
def test_an_answer_that_may_be_other_bytes_is_refused_at_once(
    fault: str, message: str, server: Any
) -> None:
    (server.folder / "file").write_bytes(CONTENTS)
    server.faults.append(fault)
    with pytest.raises(StorageError, match=message):
        open_source(f"{server.url}/file", 2048, HURRIED).read(5, 10)
    assert server.requests["file"] == 1


def test_a_range_beside_the_one_asked_for_is_never_taken(server: Any) -> None:
    (server.folder / "file").write_bytes(CONTENTS)
    server.faults += ["shifted"] * 4
    with pytest.raises(StorageError, match=r"Requested 5\.\.15, got 4\.\.15"):
        open_source(f"{server.url}/file", 2048, HURRIED).read(5, 10)


def test_nobody_there_is_one_line(server: Any) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(
        StorageError, match=r"/file cannot be read: .*Connection refused.*4 attempts"
    ):
        open_source(f"{server.url}/file?secret=1", 2048, HURRIED).read(5, 10)


def test_redirects_are_followed_but_not_in_circles(server: Any) -> None:
    (server.folder / "file").write_bytes(CONTENTS)
    source = open_source(f"{server.url}/file", 2048, HURRIED)
    server.faults += ["elsewhere"] * 2
    assert source.read(5, 10) == CONTENTS[5:15]
    server.faults += ["elsewhere"] * 99
    with pytest.raises(StorageError, match="/file: .*redirect"):
        source.read(5, 10)
    assert len(server.faults) > 40


def test_an_empty_file_is_one(server: Any) -> None:
    (server.folder / "file").touch()
    assert fetch(f"{server.url}/file", 10) == b""
    with pytest.raises(StorageError, match="has 0 bytes but its manifest says 2048"):
        open_source(f"{server.url}/file", 2048, HURRIED).read(0, 10)


def test_user_and_password_of_a_url_reach_the_server_and_no_log(
    server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (server.folder / "a b+c").write_bytes(CONTENTS)
    url = f"{server.url}/a%20b+c?x=1".replace("http://", "http://me:s%40crt@")
    server.faults += ["503", "reset"]
    assert open_source(url, 2048, HURRIED).read(5, 10) == CONTENTS[5:15]
    copy_in_sequence(url, tmp_path / "copy", HURRIED)
    assert (tmp_path / "copy").read_bytes() == CONTENTS
    assert server.logins == ["Basic bWU6c0BjcnQ="] * 4
    assert len(caplog.records) == 2
    assert "crt" not in caplog.text


def test_a_process_that_was_forked_says_so_rather_than_to_hang(server: Any) -> None:
    (server.folder / "file").write_bytes(CONTENTS)
    source = open_source(f"{server.url}/file", 2048)
    source.read(5, 10)
    with get_context("fork").Pool(1) as pool, pytest.raises(StorageError, match="by spawn"):
        pool.apply_async(methodcaller("read", 5, 10), [source]).get(20)


def test_large_parts_come_in_several_answers(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taming_dist.formats.remote.MOST_BYTES", 300)
    (server.folder / "file").write_bytes(CONTENTS)
    source = open_source(f"{server.url}/file", 2048)
    assert source.read(5, 1000) == CONTENTS[5:1005]
    assert server.requests["file"] == 4
    assert source.read_parts(5, [0, 600, 400]) == [b"", CONTENTS[5:605], CONTENTS[605:1005]]


def test_what_an_object_store_says_is_one_line(store: Any) -> None:
    source = open_source("troubled://bucket/file", 2048, HURRIED)
    for fault, message in (
        ("error", r"troubled://bucket/file cannot be read: RuntimeError: slow down$"),
        ("denied", r"troubled://bucket/file: no permission$"),
        ("short", r"troubled://bucket/file ends before byte 15"),
        ("whole", r"troubled://bucket/file: the server ignores byte ranges"),
    ):
        store.faults.append(fault)
        with pytest.raises(StorageError, match=message):
            source.read(5, 10)
    assert source.read(5, 10) == CONTENTS[5:15]


def test_the_package_of_an_object_store_asks_again_itself(bucket: str, server: Any) -> None:
    patience = Patience(attempts=1, timeout_s=10)  # none of ours
    source = open_source(f"{bucket}/file", 2048, patience)
    server.faults += ["reset", "503", "short"]
    assert source.read(5, 10) == CONTENTS[5:15]
    assert not server.faults
    with pytest.raises(MissingFile, match="s3://bucket/none is missing"):
        open_source(f"{bucket}/none").size()


def test_an_object_store_that_trickles_is_given_up_and_asked_again(
    bucket: str, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(f"{bucket}/file", 2048, Patience(2, 0.001, timeout_s=0.3))
    source.read(0, 1)
    server.faults.append("trickle")
    assert source.read(5, 900) == CONTENTS[5:905]
    assert "no answer in 1.2 s; attempt 2 of 2" in caplog.text


def test_a_store_is_listed_but_a_web_server_cannot_be(store: Any, server: Any) -> None:
    store.pipe_file("/bucket/b.tar", b"")
    store.pipe_file("/bucket/a.tar", b"")
    found = matching("troubled://bucket/*.tar")
    assert [name.rpartition("/")[2] for name in found] == ["a.tar", "b.tar"]
    assert fetch(found[0], 10) == b""
    with pytest.raises(UserError, match="lists no files"):
        matching(f"{server.url}/*.tar")


def test_a_tired_disk_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(CONTENTS)
    source = open_source(str(tmp_path / "file"), 2048, HURRIED)
    errors, pread = [errno.EIO, errno.ESTALE], os.pread

    def failing(*args: int) -> bytes:
        if errors:
            raise OSError(errors.pop(0), "gone")
        return pread(*args)

    monkeypatch.setattr(os, "pread", failing)
    assert source.read(5, 10) == CONTENTS[5:15]
    errors += [errno.EIO] * 4
    with pytest.raises(StorageError, match=r"file cannot be read: .*gone \(4 attempts\)"):
        source.read(5, 10)
    errors += [errno.EBADF]
    with pytest.raises(StorageError, match="gone$"):
        source.read(5, 10)


def test_what_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"gs:// needs .*pip install gcsfs"):
        open_source("gs://bucket/file").size()
    with pytest.raises(UserError, match="cannot read ftp://"):
        open_source("ftp://host/file")
    with pytest.raises(UserError, match=r"streaming=true data\.allow_pipe=true"):
        open_source("pipe:cat file")
    for chain in ("simplecache::s3://bucket/file", "s3://bucket::file:///etc/passwd"):
        with pytest.raises(UserError, match="cannot read s"):
            open_source(chain)


def test_locations_keep_their_query_and_hide_it_in_logs() -> None:
    url = "https://me:word@host/data/a.tar?signature=x"
    assert shown(url) == "https://host/data/a.tar"
    assert beside(folder_of(url), "b c.tar") == "https://me:word@host/data/b%20c.tar?signature=x"
    assert beside("s3://bucket/data/", "b c.tar") == "s3://bucket/data/b c.tar"
    assert beside(folder_of("data/a.tar"), "b.tar") == "data/b.tar"


def test_sources_travel_to_a_spawned_process(tmp_path: Path, server: Any) -> None:
    for path in (tmp_path / "file", server.folder / "file"):
        path.write_bytes(CONTENTS)
    sources = [open_source(str(tmp_path / "file")), open_source(f"{server.url}/file", 2048)]
    with get_context("spawn").Pool(1) as pool:
        assert pool.map(methodcaller("read", 5, 10), sources) == [CONTENTS[5:15]] * 2


def test_descriptors_are_closed_with_their_last_holder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENTS)
    before = len(os.listdir("/proc/self/fd"))
    sources = [open_source(str(tmp_path / "file")) for _ in range(9)]
    assert len(os.listdir("/proc/self/fd")) == before + 9
    del sources
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_connection_is_used_again(server: Any) -> None:
    (server.folder / "file").write_bytes(CONTENTS)
    source = open_source(f"{server.url}/file", 2048)
    accepted = []
    accept = server.get_request

    def counting() -> Any:
        accepted.append(time.monotonic())
        return accept()

    server.get_request = counting
    for start in range(20):
        source.read(start, 5)
    assert len(accepted) <= 5  # obstore may open one more before the first is free
