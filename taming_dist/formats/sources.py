"""A file that is read by ranges: what every kind of it promises, and the kind on a local disk.

What is read is the bytes that were asked for or an error, never other ones. What may pass (a reset
connection, a stall, a tired disk) is tried again, each time after a longer wait, a bounded number
of times. Sources are used from several threads and travel to other processes as their location.
"""

import errno
import itertools
import logging
import os
import random
import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from taming_dist.access import require_readable
from taming_dist.errors import UserError
from taming_dist.formats.locations import folder_of, shown

Bytes = bytes | bytearray | memoryview
Result = TypeVar("Result")

MOST_PARTS = 1024  # that one call of preadv(2) fills
# Errors of a network file system or a tired disk; the others will not pass.
PASSING_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)


class StorageError(UserError):
    """Bytes that cannot be had, after all attempts; one line that names the file or URL."""


class MissingFile(StorageError):
    """There is no such file."""


class TooLarge(StorageError):
    """A file has more bytes than are wanted of it."""


class Passing(Exception):
    """A failure that may be gone at the next attempt."""


@dataclass(frozen=True)
class Patience:
    """How long a failing read is tried: `attempts` in all, `first_wait_s` doubled after each.

    An attempt ends after `timeout_s` without a byte, and after four times that in all.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    timeout_s: float = 30.0

    @property
    def whole_s(self) -> float:
        """Seconds after which an attempt ends, however many bytes still come."""
        return 4 * self.timeout_s

    def insist(self, location: str, attempt: Callable[[], Result]) -> Result:
        """The result of the first attempt that does not fail in passing; else `StorageError`."""
        for number in range(1, self.attempts + 1):
            try:
                return attempt()
            except Passing as error:
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


def split(data: Bytes, lengths: Sequence[int]) -> list[bytes]:
    """Copies of neighbouring parts, so that each is freed when it is no longer needed."""
    view, ends = memoryview(data), itertools.accumulate(lengths)
    return [bytes(view[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


class LocalFile:
    """A file on a disk; its descriptor is closed when nobody holds the object any more."""

    def __init__(
        self, location: str, size: int | None = None, patience: Patience = PATIENCE
    ) -> None:
        self.location, self._size, self._patience = location, size, patience
        self._open()
        if size is not None and self.size() != size:
            raise other_size(location, self.size(), size)

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
                raise cut_short(self.location, start + length)
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
                    raise Passing(one_line(error)) from error
                raise StorageError(f"{self.location} cannot be read: {one_line(error)}") from error

        return self._patience.insist(self.location, attempt)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length, without the query of a URL."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"\?\S+", "?...", text)
    return text if len(text) <= 200 else text[:200] + "..."


def cut_short(location: str, end: int) -> StorageError:
    """The error of a file that ends before the byte `end`."""
    return StorageError(
        f"{shown(location)} ends before byte {end}: it was cut or changed; {_verify(location)}"
    )


def other_size(location: str, found: int, expected: int) -> StorageError:
    """The error of a file that has not the size that is known of it."""
    return StorageError(
        f"{shown(location)} has {found} bytes but its manifest says {expected}: it was cut or "
        f"changed; {_verify(location)}"
    )


def _verify(location: str) -> str:
    return f"run: python tools/verify_shards.py {shown(folder_of(location))}"
