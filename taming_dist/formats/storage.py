"""Bytes of shards, wherever they lie: local files, http(s) servers, object stores through fsspec.

A location is a local path or a URL, as a string. What is read is the bytes that were asked for or
an error, never other ones: a server that ignores ranges, a file of another size and a short answer
are found. What may pass (a reset connection, an answer 5xx, a stall) is tried again, each time
after a longer wait, a bounded number of times. Objects here are used from several threads and
travel to other processes as their location.
"""

import errno
import glob
import itertools
import logging
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer  # another class than the builtin in 3.10
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote

import fsspec
import numpy as np
import requests
import urllib3

from taming_dist.access import require_readable
from taming_dist.errors import UserError

Bytes = bytes | bytearray | memoryview
Result = TypeVar("Result")

MOST_PARTS = 1024  # that one call of preadv(2) fills

# What brings each scheme of fsspec; None: fsspec itself, or a dependency of this package.
OBJECT_STORES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "hf": None,
    "memory": None,
}
SCHEMES = ("http", "https", *OBJECT_STORES)
NOT_FOUND = (404, 410)
TRY_AGAIN = (408, 425, 429)
PERMANENT_FAILURES = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.TooManyRedirects,
)
# Errors of a network file system or a tired disk; the others will not pass.
PASSING_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
SLOWEST_BYTES_PER_S = 2**17  # a read may last as long as at this speed, beside the time-out
CHUNK = 2**25


class StorageError(UserError):
    """Bytes that cannot be had, after all attempts; one line that names the file or URL."""


class MissingFile(StorageError):
    """There is no such file."""


class TooLarge(StorageError):
    """A file has more bytes than are wanted of it."""


class _Passing(Exception):
    """A failure that may be gone at the next attempt."""


@dataclass(frozen=True)
class Patience:
    """How long a failing read is tried: `attempts` in all, `first_wait_s` doubled after each, and
    `timeout_s` without a byte end an attempt."""

    attempts: int = 6
    first_wait_s: float = 0.5
    timeout_s: float = 30.0

    def insist(self, location: str, attempt: Callable[[], Result]) -> Result:
        """The result of the first attempt that does not fail in passing; else `StorageError`."""
        for number in range(1, self.attempts + 1):
            try:
                return attempt()
            except _Passing as error:
                failure = str(error)
            if number < self.attempts:
                # Drawn anew by everyone, or a thousand ranks would come back in the same moment.
                wait = self.first_wait_s * 2 ** (number - 1) * random.uniform(0.5, 1)
                logging.getLogger(__name__).warning(
                    "%s: %s; attempt %d of %d in %.1f s",
                    *(shown(location), failure, number + 1, self.attempts, wait),
                )
                time.sleep(wait)
        raise StorageError(
            f"{shown(location)} cannot be read: {failure} ({self.attempts} attempts)"
        )


PATIENCE = Patience()


class Source(Protocol):
    """One file whose bytes can be read at any place, from any thread."""

    location: str

    def read(self, start: int, length: int) -> bytes:
        """The bytes [start, start + length); `StorageError` if they cannot be had."""
        ...

    def read_parts(self, start: int, lengths: Sequence[int]) -> Sequence[Bytes]:
        """Neighbouring parts from `start` on in one read, each in memory of its own."""
        ...

    def size(self) -> int:
        """Bytes of the whole file; `MissingFile` if there is none."""
        ...


def split(data: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Copies of neighbouring parts, so that each is freed when it is no longer needed."""
    ends = itertools.accumulate(lengths)
    return [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def is_url(location: str) -> bool:
    """Whether a location is a URL, of any scheme."""
    return "://" in location or location.startswith("pipe:")


def shown(location: str) -> str:
    """A location as it may stand in logs: without user, password and query (signatures)."""
    if not is_url(location) or location.startswith("pipe:"):
        return location
    scheme, _, rest = _split_query(location)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _split_query(location: str) -> tuple[str, str]:
    """A location without its query, and the query; names in stores may hold question marks."""
    if not location.startswith(("http://", "https://")):
        return location, ""
    base, mark, query = location.partition("?")
    return base, mark + query


def file_name(location: str) -> str:
    """The last part of a location's path."""
    return _split_query(location)[0].rpartition("/")[2]


def folder_of(location: str) -> str:
    """The folder that a file lies in, as a location."""
    if not is_url(location):
        return str(Path(location).parent)
    base, query = _split_query(location)
    return base.rpartition("/")[0] + query


def beside(folder: str, name: str) -> str:
    """The location of the file `name`, a plain file name, in a folder."""
    if not is_url(folder):
        return str(Path(folder) / name)
    base, query = _split_query(folder)
    if folder.startswith(("http://", "https://")):
        name = quote(name)
    return f"{base.rstrip('/')}/{name}{query}"


def check_scheme(location: str) -> None:
    """Raise `UserError` for a URL that cannot be read by ranges."""
    if location.startswith("pipe:"):
        raise UserError(
            f"{location!r}: a pipe has no byte ranges; it can be read with data.streaming=true "
            f"data.allow_pipe=true only"
        )
    if not is_url(location):
        return
    scheme = location.partition("://")[0]
    # fsspec takes a double colon for the mark of a chain, whose end may be any file system.
    if scheme not in SCHEMES or (scheme in OBJECT_STORES and "::" in location):
        raise UserError(
            f"{shown(location)}: cannot read {scheme}://; give a local path or one of "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )


def open_source(location: str, size: int | None = None, patience: Patience = PATIENCE) -> Source:
    """Open a file for reading ranges; `size` is what it must have.

    Raises `MissingFile`, or `StorageError` if the size is another (of a URL: at the first read),
    and `UserError` for a scheme that cannot be read.
    """
    check_scheme(location)
    if not is_url(location):
        return LocalFile(location, size, patience)
    kind = HttpFile if location.startswith("http") else StoredObject
    return kind(location, size, patience)


def fetch(location: str, limit: int, patience: Patience = PATIENCE) -> bytes:
    """All bytes of a small file; `StorageError` if it has more than `limit`."""
    source = open_source(location, None, patience)
    size = source.size()
    if size > limit:
        raise TooLarge(f"{shown(location)} has {size} bytes, more than {limit}: not read")
    return source.read(0, size)


def matching(pattern: str) -> list[str]:
    """The locations that match a glob, sorted; a plain http server cannot list its files."""
    if not is_url(pattern):
        return sorted(glob.glob(pattern))
    check_scheme(pattern)
    if pattern.startswith("http"):
        raise UserError(
            f"{shown(pattern)}: an http server lists no files; give the folder of a manifest, or "
            f"a brace expansion such as train-{{000000..000099}}.tar"
        )
    system, path = _filesystem(pattern)
    try:
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except Exception as error:  # each store raises its own types
        raise StorageError(f"{shown(pattern)} cannot be listed: {one_line(error)}") from error


def download(location: str, file: BinaryIO, patience: Patience = PATIENCE) -> None:
    """Copy a whole file into an open one, range by range."""
    size = open_source(location, None, patience).size()
    source = open_source(location, size, patience)
    for start in range(0, size, CHUNK):
        data = source.read(start, min(CHUNK, size - start))
        try:
            file.write(data)
        except OSError as error:
            raise StorageError(
                f"{shown(location)}: no room for a copy of {size} bytes in {file.name} "
                f"({error.strerror})"
            ) from error


def copy_in_sequence(location: str, path: Path, patience: Patience = PATIENCE) -> None:
    """Copy a whole file that need not be readable by ranges: also from a plain web server, or what
    the command of a `pipe:` prints. Each attempt starts anew, so nothing comes twice."""

    def attempt() -> None:
        with open(path, "wb") as file:
            if location.startswith("pipe:"):
                _run_pipe(location.removeprefix("pipe:"), file, patience.timeout_s)
            elif location.startswith(("http://", "https://")):
                _copy_answer(location, file, patience.timeout_s)
            else:
                download(location, file, patience)

    patience.insist(location, attempt)


def _run_pipe(command: str, file: BinaryIO, timeout_s: float) -> None:
    """Write what a shell command prints; an error if any part of it fails, or stands still."""
    # pipefail, or the failure of all but the last command of a pipeline would not be seen
    shell = ["bash", "-o", "pipefail", "-c", command]
    with subprocess.Popen(shell, stdout=file, start_new_session=True) as process:
        size = -1
        while process.poll() is None:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                before, size = size, os.fstat(file.fileno()).st_size
                if size == before:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise _Passing(f"no byte in {timeout_s:.3g} s") from error
    if process.returncode:
        raise _Passing(f"the command ends with {process.returncode}")


def _copy_answer(location: str, file: BinaryIO, timeout_s: float) -> None:
    headers = {"Accept-Encoding": "identity"}
    try:
        with _session().get(location, headers=headers, stream=True, timeout=timeout_s) as response:
            _check_status(response, location)
            length = response.headers.get("Content-Length")
            for part in iter(lambda: response.raw.read1(CHUNK, decode_content=False), b""):
                file.write(part)
    except PERMANENT_FAILURES as error:
        raise StorageError(f"{shown(location)}: {one_line(error)}") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _Passing(one_line(error)) from error
    if length is not None and file.tell() != int(length):
        raise _Passing(f"the answer ends after {file.tell()} of {length} bytes")


@contextmanager
def local_copy(location: str, folder: Path | None = None) -> Iterator[Path]:
    """The path of a file that, if it is remote, is copied for as long as the block lasts.

    Copies keep their name and lie below `folder`, or where temporary files do.
    """
    if not is_url(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="shards.", suffix=".tmp", dir=folder) as room:
        path = Path(room) / (file_name(location) or "file")
        with open(path, "wb") as file:
            download(location, file)
        yield path


class LocalFile:
    """A file on a disk; its descriptor is closed when nobody holds the object any more."""

    def __init__(
        self, location: str, size: int | None = None, patience: Patience = PATIENCE
    ) -> None:
        self.location, self._size, self._patience = location, size, patience
        self._open()
        if size is not None and self.size() != size:
            raise _changed(location, self.size(), size)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.location, self._size, self._patience)

    def size(self) -> int:
        return self._insist(lambda: os.fstat(self._descriptor).st_size)

    def read(self, start: int, length: int) -> bytes:
        data = self._insist(lambda: os.pread(self._descriptor, length, start))
        while len(data) < length:  # the kernel gives at most 2 GiB at once
            place, missing = start + len(data), length - len(data)
            more = self._insist(partial(os.pread, self._descriptor, missing, place))
            if not more:
                raise _cut(self.location, start + length)
            data += more
        return data

    def read_parts(self, start: int, lengths: Sequence[int]) -> Sequence[Bytes]:
        if len(lengths) > MOST_PARTS:
            return split(self.read(start, sum(lengths)), lengths)
        parts = [np.empty(length, np.uint8).data for length in lengths]  # the kernel fills each
        if self._insist(lambda: os.preadv(self._descriptor, parts, start)) == sum(lengths):
            return parts
        return split(self.read(start, sum(lengths)), lengths)  # over 2 GiB, or an error

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.location, os.O_RDONLY)
        except FileNotFoundError as error:
            raise MissingFile(f"{self.location} is missing") from error
        except OSError as error:
            require_readable(self.location)
            raise StorageError(f"{self.location} cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def _insist(self, call: Callable[[], Result]) -> Result:
        def attempt() -> Result:
            try:
                return call()
            except OSError as error:
                if error.errno in PASSING_ERRNOS:
                    raise _Passing(one_line(error)) from error
                raise StorageError(f"{self.location} cannot be read: {one_line(error)}") from error

        return self._patience.insist(self.location, attempt)


class HttpFile:
    """A file on a web server that answers range requests (RFC 9110, section 14)."""

    def __init__(
        self, location: str, size: int | None = None, patience: Patience = PATIENCE
    ) -> None:
        self.location, self._size, self._patience = location, size, patience

    def size(self) -> int:
        """Asked by a range of one byte: links that are signed for GET refuse HEAD."""
        return self._patience.insist(self.location, lambda: self._get(0, 1, 0)[0])

    def read(self, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        total, data = self._patience.insist(self.location, lambda: self._get(start, length, length))
        return data

    def read_parts(self, start: int, lengths: Sequence[int]) -> Sequence[Bytes]:
        return split(self.read(start, sum(lengths)), lengths)

    def _get(self, start: int, length: int, wanted: int) -> tuple[int, bytes]:
        """The size of the whole file, and the first `wanted` bytes of a range."""
        deadline = time.monotonic() + self._patience.timeout_s + length / SLOWEST_BYTES_PER_S
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        try:
            with _session().get(
                self.location, headers=headers, stream=True, timeout=self._patience.timeout_s
            ) as response:
                total = self._check(response, start, length)
                return total, _body(response, wanted, deadline) if total else b""
        except PERMANENT_FAILURES as error:
            raise StorageError(f"{shown(self.location)}: {one_line(error)}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _Passing(one_line(error)) from error

    def _check(self, response: requests.Response, start: int, length: int) -> int:
        """The size of the file that an answer is a range of; an error if it is another answer."""
        code = response.status_code
        place = response.headers.get("Content-Range", "")
        if code == 416 and place.replace(" ", "") == "bytes*/0" and not self._size:
            return 0
        if code == 416:
            raise _cut(self.location, start + length)
        if code == 200:
            raise StorageError(
                f"{shown(self.location)}: the server ignores byte ranges; copy the shards, or "
                f"read them in sequence with data.streaming=true"
            )
        _check_status(response, self.location, 206)
        return self._check_range(response, place, start, length)

    def _check_range(self, response: requests.Response, place: str, start: int, length: int) -> int:
        found = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})", place.strip())
        coded = response.headers.get("Content-Encoding", "identity") != "identity"
        if found is None or coded:
            raise StorageError(
                f"{shown(self.location)}: the server answers a range with {place!r}, which says "
                f"not what it is; copy the shards, or use data.streaming=true"
            )
        first, last, total = (int(number) for number in found.groups())
        if self._size is not None and total != self._size:
            raise _changed(self.location, total, self._size)
        if total < start + length:
            raise _cut(self.location, start + length)
        if first != start or last != start + length - 1:
            raise _Passing(f"the server answers bytes {first}-{last} instead of the range")
        return total


def _check_status(response: requests.Response, location: str, wanted: int = 200) -> None:
    code = response.status_code
    if code in NOT_FOUND:
        raise MissingFile(f"{shown(location)} is missing (the server answers {code})")
    if code in TRY_AGAIN or code >= 500:
        raise _Passing(f"the server answers {code} {response.reason}")
    if code != wanted:
        raise StorageError(f"{shown(location)}: the server answers {code}")


def _body(response: requests.Response, length: int, deadline: float) -> bytes:
    """The first `length` bytes of an answer, before the deadline."""
    parts: list[bytes] = []
    missing = length
    while missing > 0:
        # read1 comes back with whatever is there, so a trickle cannot hold us past the deadline.
        part = response.raw.read1(missing, decode_content=False)
        if not part:
            raise _Passing(f"the answer ends {missing} bytes early")
        parts.append(part)
        missing -= len(part)
        if time.monotonic() > deadline:
            raise _Passing(f"slower than {SLOWEST_BYTES_PER_S} bytes per second")
    return b"".join(parts)


_sessions = threading.local()
if hasattr(os, "register_at_fork"):  # a child must not talk on its parent's connections
    os.register_at_fork(after_in_child=lambda: _sessions.__dict__.clear())


def _session() -> requests.Session:
    """This thread's connections, which are kept open between reads."""
    if not hasattr(_sessions, "session"):
        _sessions.session = requests.Session()
    return _sessions.session


class StoredObject:
    """An object of a store that fsspec knows: s3://, gs://, abfs://, hf://, memory:// ..."""

    def __init__(
        self, location: str, size: int | None = None, patience: Patience = PATIENCE
    ) -> None:
        self.location, self._size, self._patience = location, size, patience
        self._checked = size is None

    def size(self) -> int:
        return self._insist(lambda system, path: int(system.info(path)["size"]), 0)

    def read(self, start: int, length: int) -> bytes:
        if not self._checked:
            self._check_size()

        def cut(system: Any, path: str) -> bytes:
            data = system.cat_file(path, start=start, end=start + length)
            if len(data) != length:
                raise _Passing(f"the answer has {len(data)} of {length} bytes")
            return data

        return self._insist(cut, length) if length else b""

    def read_parts(self, start: int, lengths: Sequence[int]) -> Sequence[Bytes]:
        return split(self.read(start, sum(lengths)), lengths)

    def _check_size(self) -> None:
        found = self.size()
        if found != self._size:
            raise _changed(self.location, found, self._size or 0)
        self._checked = True

    def _insist(self, call: Callable[[Any, str], Result], length: int) -> Result:
        limit = self._patience.timeout_s + length / SLOWEST_BYTES_PER_S

        def attempt() -> Result:
            try:
                return _within(limit, lambda: call(*_filesystem(self.location)))
            except (UserError, _Passing, MemoryError):
                raise
            except FileNotFoundError as error:
                raise MissingFile(f"{shown(self.location)} is missing") from error
            except PermissionError as error:
                raise StorageError(f"{shown(self.location)}: no permission") from error
            except Exception as error:  # each store raises its own types
                raise _Passing(one_line(error)) from error

        return self._patience.insist(self.location, attempt)


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of a call that has no time-out of its own; it is given up after `seconds`."""
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised again where the answer is awaited
            answer.set_exception(error)

    threading.Thread(target=run, name="storage", daemon=True).start()
    try:
        return answer.result(seconds)
    except NoAnswer as error:
        raise _Passing(f"no answer in {seconds:.3g} s") from error


def _filesystem(location: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it."""
    scheme = location.partition(":")[0]
    try:
        return fsspec.core.url_to_fs(location)
    except ImportError as error:
        package = OBJECT_STORES[scheme] or scheme
        raise UserError(
            f"{shown(location)}: {scheme}:// needs a package that is not installed; "
            f"run: pip install {package}"
        ) from error


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length, without the query of a URL."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"\?\S+", "?...", text)
    return text if len(text) <= 200 else text[:200] + "..."


def _cut(location: str, end: int) -> StorageError:
    return StorageError(
        f"{shown(location)} ends before byte {end}: it was cut or changed; {_verify(location)}"
    )


def _changed(location: str, found: int, expected: int) -> StorageError:
    return StorageError(
        f"{shown(location)} has {found} bytes but its manifest says {expected}: it was cut or "
        f"changed; {_verify(location)}"
    )


def _verify(location: str) -> str:
    return f"run: python tools/verify_shards.py {shown(folder_of(location))}"
