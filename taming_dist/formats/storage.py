"""Bytes of shards, wherever they lie: local files, http(s) servers, object stores through fsspec.

A location is a local path or a URL, as a string. What is read is the bytes that were asked for or
an error, never other ones. locations.py has the names, sources.py local files, remote.py the rest.
"""

import glob
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from taming_dist.errors import UserError
from taming_dist.formats.locations import (
    beside,
    check_scheme,
    file_name,
    folder_of,
    is_url,
    is_web,
    shown,
)
from taming_dist.formats.remote import HttpFile, StoredObject, copy_answer, open_store
from taming_dist.formats.sources import (
    PATIENCE,
    Bytes,
    LocalFile,
    MissingFile,
    Passing,
    Patience,
    Source,
    StorageError,
    TooLarge,
    one_line,
)

__all__ = [
    "Bytes",
    "MissingFile",
    "Patience",
    "Source",
    "StorageError",
    "TooLarge",
    "beside",
    "check_scheme",
    "copy_in_sequence",
    "download",
    "fetch",
    "file_name",
    "folder_of",
    "is_url",
    "local_copy",
    "matching",
    "one_line",
    "open_source",
    "shown",
]

CHUNK = 2**25


def open_source(location: str, size: int | None = None, patience: Patience = PATIENCE) -> Source:
    """Open a file for reading ranges; `size` is what it must have.

    Raises `MissingFile`, or `StorageError` if the size is another (of a URL: at the first read),
    and `UserError` for a scheme that cannot be read.
    """
    check_scheme(location)
    if not is_url(location):
        return LocalFile(location, size, patience)
    kind = HttpFile if is_web(location) else StoredObject
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
    if is_web(pattern):
        raise UserError(
            f"{shown(pattern)}: an http server lists no files; give the folder of a manifest, or "
            f"a brace expansion such as train-{{000000..000099}}.tar"
        )
    system, path = open_store(pattern)
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
            elif is_web(location):
                copy_answer(location, file, patience.timeout_s)
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
                    raise Passing(f"no byte in {timeout_s:.3g} s") from error
    if process.returncode:
        raise Passing(f"the command ends with {process.returncode}")


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
