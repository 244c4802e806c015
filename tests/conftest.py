"""What several folders of tests use: a web server that answers ranges, and now and then wrongly,
slowly or not at all; and command lines of training, composed in this process."""

import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook below knows it by its name)

# Before any of them is imported: in this process every call of theirs is checked against its
# signature, shapes and types of tensors included.
install_import_hook(["taming_dist.models", "taming_dist.losses"], "tests.typechecker.checked")

# Where the tests themselves run in the background of a script or under nohup, these are ignored,
# and programs that they start would rightly leave it so.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch  # not for tests that need no torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")


class Server(ThreadingHTTPServer):
    """Serves a folder. `faults` are met by the next requests, one each; see `Handler`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.requests: Counter[str] = Counter()
        self.logins: list[str | None] = []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients of these tests hang up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        file = self.server.folder / self.path.lstrip("/")
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        self.server.requests[path] += 1
        self.server.logins.append(self.headers.get("Authorization"))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "stall":
            self.server.released.wait(20)
            fault = "reset"
        if fault == "reset":
            # Linger zero seconds: the connection ends with a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "elsewhere":
            return self.redirect(self.path)
        file = self.server.folder / path
        if not file.is_file():
            return self.send_error(404)
        return self.answer(file.read_bytes(), fault)

    def redirect(self, path: str) -> None:
        self.send_response(302)
        self.send_header("Location", path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, whole: bytes, fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or fault == "whole":
            return self.send(200, whole, "", fault)
        first, last = int(asked[1]), min(int(asked[2]), len(whole) - 1)
        if first >= len(whole):
            return self.send(416, b"", f"bytes */{len(whole)}", fault)
        if fault == "shifted":
            first -= 1
        total = len(whole) + 1 if fault == "grown" else len(whole)
        return self.send(206, whole[first : last + 1], f"bytes {first}-{last}/{total}", fault)

    def send(self, code: int, data: bytes, place: str, fault: str) -> None:
        self.send_response(code)
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        else:
            self.send_header("Content-Length", str(len(data)))
        if place and fault != "unnamed":
            self.send_header("Content-Range", place)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if fault == "short":
            self.close_connection = True
            data = data[: len(data) // 2]
        if fault == "trickle":
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A web server of the folder tmp_path/served."""
    from taming_dist.formats.remote import web_store

    (tmp_path / "served").mkdir()
    running = Server(tmp_path / "served")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()
    thread.join()
    web_store.cache_clear()  # nobody else would close these connections before 90 s are over


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Within the block that it gives, the system lets no file grow larger than so many bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no launcher or signal handler of ours in this process."""
    monkeypatch.chdir(tmp_path)
    from taming_dist.training.signals import StopRequest  # not for tests that need no torch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(StopRequest, "install", lambda self: self)
    monkeypatch.setattr(os, "environ", os.environ)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return tmp_path


@pytest.fixture
def compose(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The typed configuration of a command line."""
    import taming_dist.train as entry
    from taming_dist.stages.interface import Config

    def call(*overrides: str) -> Config:
        found: list[Config] = []
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["train.py", *overrides])
            patched.setattr(entry, "train", lambda config, stop: found.append(config))
            entry.main()
        return found[0]

    return call
