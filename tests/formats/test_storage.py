import errno
import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from taming_dist.errors import UserError
from taming_dist.formats.storage import (
    MissingFile,
    Patience,
    Source,
    StorageError,
    beside,
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
    released = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("troubled://").strip("/")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "error":
            raise RuntimeError("slow down")
        if fault == "stall":
            self.released.wait(20)
        data = super().cat_file(path, start, end, **kwargs)
        return data[:-1] if fault == "short" else data


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    fsspec.register_implementation("troubled", TroubledStore, clobber=True)
    monkeypatch.setattr("taming_dist.formats.storage.SCHEMES", ("http", "troubled"))
    system = fsspec.filesystem("troubled")
    system.pipe_file("/bucket/file", CONTENTS)
    system.faults.clear()
    yield system
    system.released.set()


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
    assert len(caplog.records) == 2
    assert "attempt 3 of 4" in caplog.text


def test_waits_grow_and_end_in_one_line_that_names_the_url(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr("taming_dist.formats.storage.time", clock)
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
        ("unnamed", "says not what it is"),
        ("gzip", "says not what it is"),
        ("grown", "has 2049 bytes but its manifest says 2048"),
        ("403", "answers 403"),
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
    with pytest.raises(StorageError, match="bytes 4-14 instead of the range"):
        open_source(f"{server.url}/file", 2048, HURRIED).read(5, 10)


def test_nobody_there_is_one_line(server: Any) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(StorageError, match=r"/file cannot be read: ConnectionError.*4 attempts"):
        open_source(f"{server.url}/file?secret=1", 2048, HURRIED).read(5, 10)


def test_an_object_store_that_fails_or_stalls_is_asked_again(store: Any) -> None:
    store.faults += ["error", "stall", "short"]
    source = open_source("troubled://bucket/file", 2048, HURRIED)
    assert source.read(5, 10) == CONTENTS[5:15]
    assert store.faults == []
    store.faults += ["error"] * 4
    with pytest.raises(StorageError, match=r"troubled://bucket/file cannot.*slow down \(4 attem"):
        source.read(5, 10)


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
    with pytest.raises(UserError, match=r"s3:// needs .*pip install s3fs"):
        open_source("s3://bucket/file").size()
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


def _read(source: Source) -> bytes:
    return source.read(5, 10)


def test_sources_travel_to_a_spawned_process(tmp_path: Path, server: Any) -> None:
    for path in (tmp_path / "file", server.folder / "file"):
        path.write_bytes(CONTENTS)
    sources = [open_source(str(tmp_path / "file")), open_source(f"{server.url}/file", 2048)]
    with get_context("spawn").Pool(1) as pool:
        assert pool.map(_read, sources) == [CONTENTS[5:15]] * 2


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
    assert len(accepted) <= 1
