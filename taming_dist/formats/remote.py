"""Files elsewhere, read by ranges: on web servers through obstore, in object stores through fsspec.

Connections, redirects, proxies, certificates, credentials and time-outs are those of the libraries.
What they leave to do, each shown by a test: obstore repeats no answer that breaks off if the server
names no ETag, tells nobody that it repeats, and takes encoded bytes; fsspec takes any answer for
the range, and a trickle has no end.
"""

import base64
import http.client
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import fsspec
import obstore
from fsspec.exceptions import FSTimeoutError
from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import HTTPStore

from taming_dist.errors import UserError
from taming_dist.formats.locations import OBJECT_STORES, file_name, folder_of, shown
from taming_dist.formats.sources import (
    PATIENCE,
    Bytes,
    MissingFile,
    Passing,
    Patience,
    StorageError,
    cut_short,
    one_line,
    other_size,
    split,
)

MOST_BYTES = 2**24  # in one answer, so that the time for it may have a limit
CHUNK = 2**20
NOT_FOUND = (404, 410)
TRY_AGAIN = (408, 425, 429)


class RemoteFile(ABC):
    """What both kinds share: a file read in answers of bounded size, each tried several times."""

    def __init__(
        self, location: str, size: int | None = None, patience: Patience = PATIENCE
    ) -> None:
        self.location, self._size, self._patience = location, size, patience

    def read(self, start: int, length: int) -> bytes:
        return bytes(self._read(start, length))

    def read_parts(self, start: int, lengths: Sequence[int]) -> Sequence[Bytes]:
        return split(self._read(start, sum(lengths)), lengths)

    def size(self) -> int:
        return self._patience.insist(self.location, self._get_size)

    def _read(self, start: int, length: int) -> Bytes:
        end = start + length
        bounds = [*range(start, end, MOST_BYTES), end]
        answers = [
            self._patience.insist(self.location, partial(self._get, *ends))
            for ends in itertools.pairwise(bounds)
        ]
        return answers[0] if len(answers) == 1 else b"".join(answers)

    @abstractmethod
    def _get(self, start: int, stop: int) -> Bytes:
        """The bytes [start, stop), by one attempt; what may pass is `Passing`."""

    @abstractmethod
    def _get_size(self) -> int:
        """The size of the whole file, by one attempt."""


class HttpFile(RemoteFile):
    """A file on a web server that answers range requests (RFC 9110, section 14)."""

    def _get(self, start: int, stop: int) -> Bytes:
        total, data = self._ask(start, stop)
        if self._size is not None and total != self._size:
            raise other_size(self.location, total, self._size)
        if len(data) < stop - start:
            raise cut_short(self.location, stop)
        return data

    def _get_size(self) -> int:
        return self._ask(0, 1)[0]  # not by HEAD, which links that are signed for GET refuse

    def _ask(self, start: int, stop: int) -> tuple[int, Bytes]:
        """The size of the whole file, and of the bytes [start, stop) those that it has."""
        _require_no_fork(self.location)
        store = web_store(folder_of(self.location), self._patience)
        name = unquote(file_name(self.location))
        try:
            answer = obstore.get(store, name, options={"range": (start, stop)})
            if "Content-Encoding" in answer.attributes:
                raise _unclear(self.location)
            return answer.meta["size"], memoryview(answer.bytes())
        except (BaseError, OSError, ValueError) as error:
            code, _ = _status(error)
            if code == 416 and start == 0:  # not even a first byte
                return 0, b""
            if code == 416:
                raise cut_short(self.location, stop) from error
            raise _failure(self.location, error) from error


_talking: set[int] = set()  # processes with connections, where fork(2) has copied this module


def _require_no_fork(location: str) -> None:
    """obstore's threads do not live on in a fork: a read there would never end."""
    _talking.add(os.getpid())
    if len(_talking) > 1:
        raise StorageError(
            f"{shown(location)} cannot be read in a process that was forked from one that reads "
            f"URLs: start it by spawn or forkserver"
        )


@lru_cache(maxsize=256)
def web_store(folder: str, patience: Patience) -> HTTPStore:
    """The connections to a folder of a web server, kept open between reads."""
    url, headers = _without_login(folder)
    return HTTPStore(
        url,
        client_options={
            "allow_http": True,
            "default_headers": headers,
            "connect_timeout": timedelta(seconds=patience.timeout_s),
            "read_timeout": timedelta(seconds=patience.timeout_s),
            "timeout": timedelta(seconds=patience.whole_s),
        },
        retry_config={"max_retries": 0},
    )


def _without_login(location: str) -> tuple[str, dict[str, str]]:
    """A URL without user and password, and the header that says them."""
    parts = urlsplit(location)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return location, {}
    token = base64.b64encode(unquote(login).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}


def _status(error: Exception) -> tuple[int, str]:
    """The status code that obstore was answered with, and its name; 0 if it was something else."""
    found = re.search(r"status code: (\d{3}) ?([A-Za-z ]*)", str(error))
    return (int(found[1]), found[2]) if found else (0, "")


def _failure(location: str, error: Exception) -> Exception:
    """What an error of obstore means. It has one class for most of them, so its text is read."""
    said, _, inside = str(error).partition("Debug source")
    if isinstance(error, NotSupportedError):
        return _no_ranges(location)
    if "Content-Range" in said or "Content-Length" in said:  # there is none
        return _unclear(location)
    code, name = _status(error)
    if code:
        return _refusal(location, code, name)
    if isinstance(error, ValueError) or "kind: Redirect" in inside:
        return StorageError(f"{shown(location)}: {one_line(ValueError(said))}")
    # "error sending request" is all that it says; why is told inside.
    causes = re.findall(r'HttpError \{\s*kind: (\w+)|(?:message|error): "([^"]+)"', inside)
    why = ", ".join(kind or message for kind, message in causes)
    what = said.rpartition(" - ")[2].rpartition("error: ")[2].strip()
    return Passing(f"{what}{why and f' ({why})'}")


def _refusal(location: str, code: int, name: str) -> Exception:
    """The error of a status code that is no success."""
    if code in NOT_FOUND:
        return MissingFile(f"{shown(location)} is missing (the server answers {code})")
    if code in TRY_AGAIN or code >= 500:
        return Passing(f"the server answers {code} {name.strip()}")
    return StorageError(f"{shown(location)}: the server answers {code}")


def _no_ranges(location: str) -> StorageError:
    return StorageError(
        f"{shown(location)}: the server ignores byte ranges; copy the shards, or read them in "
        f"sequence with data.streaming=true"
    )


def _unclear(location: str) -> StorageError:
    return StorageError(
        f"{shown(location)}: the server's answer to a range does not say what it is "
        f"(Content-Range, Content-Length), or is compressed; copy the shards, or use "
        f"data.streaming=true"
    )


def copy_answer(location: str, file: BinaryIO, timeout_s: float) -> None:
    """Write a whole file of a web server, which need know no ranges, by one attempt.

    Not through obstore, which refuses an answer that does not tell its length first.
    """
    url, headers = _without_login(location)
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    with _losses(location):
        response = urlopen(request, timeout=timeout_s)
    with response:
        copied = 0
        while part := _next_part(location, response):
            copied += file.write(part)
        length = response.headers.get("Content-Length")
    if length is not None and copied != int(length):
        raise Passing(f"the answer ends after {copied} of {length} bytes")


def _next_part(location: str, response: http.client.HTTPResponse) -> bytes:
    with _losses(location):
        return response.read1(CHUNK)


@contextmanager
def _losses(location: str) -> Iterator[None]:
    """Give errors of a connection, but not those of a full disk, their names."""
    try:
        yield
    except HTTPError as error:
        raise _refusal(location, error.code, str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Passing(one_line(error)) from error


class StoredObject(RemoteFile):
    """An object of a store that fsspec knows: s3://, gs://, abfs://, hf://, memory:// ...

    Its package tries again what fails (s3fs: connections reset, 5xx, 429, stalls, answers cut
    short), in its own way. A trickle has no end there: what takes too long is tried anew here.
    """

    _checked = False

    def _get(self, start: int, stop: int) -> Bytes:
        if self._size is not None and not self._checked:
            if (found := self.size()) != self._size:
                raise other_size(self.location, found, self._size)
            self._checked = True
        data = self._call("cat_file", start=start, end=stop)
        if len(data) < stop - start:
            raise cut_short(self.location, stop)
        if len(data) > stop - start:
            raise _no_ranges(self.location)
        return data

    def _get_size(self) -> int:
        return int(self._call("info")["size"])

    def _call(self, name: str, **options: Any) -> Any:
        """What a method of the file system gives for this object."""
        system, path = open_store(self.location)
        if system.async_impl:
            options["timeout"] = self._patience.whole_s
        try:
            return getattr(system, name)(path, **options)
        except FileNotFoundError as error:
            raise MissingFile(f"{shown(self.location)} is missing") from error
        except PermissionError as error:
            raise StorageError(f"{shown(self.location)}: no permission") from error
        except (TimeoutError, FSTimeoutError) as error:
            raise Passing(f"no answer in {self._patience.whole_s:.3g} s") from error
        except MemoryError:
            raise
        except Exception as error:  # each store raises its own types
            raise StorageError(
                f"{shown(self.location)} cannot be read: {one_line(error)}"
            ) from error


def open_store(location: str) -> tuple[Any, str]:
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
