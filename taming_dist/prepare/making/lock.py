"""One run at a time in a folder: a lock of the operating system, which ends with its processes.

flock(2) needs no renewal, no clock and no clean-up: the kernel releases the lock when the last
process that holds it has ended, however it ended. Leases, as in prepare/tokenization/claims.py, let
workers of several machines share one job; here a second run has to be turned away at once.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from taming_dist.errors import UserError

# Workers of a run that was killed end within moments, in the middle of a file or not.
PATIENCE_S, POLL_S = 1.0, 0.05
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Lock:
    """A lock that is held; a worker process that is given it holds it too, until both end."""

    descriptor: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (reduction.DupFd(self.descriptor),)


def _receive(sent: Any) -> Lock:
    return Lock(sent.detach())


@contextmanager
def locking(path: Path) -> Iterator[Lock]:
    """Hold the lock file `path`, which is made in its folder, as is that, and goes away at the end.

    A folder in which nothing is then goes away as well. Raises `UserError` if another run has the
    lock. Where the file system knows no locks, a line says so and nothing is locked.
    """
    descriptor = _acquire(path)
    try:
        os.truncate(descriptor, 0)  # what a run that was killed wrote
        os.write(descriptor, f"process {os.getpid()} of {socket.gethostname()}".encode())
        yield Lock(descriptor)
    finally:
        # Removed while it is held: whoever opened it before finds out in `_is_at`.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # there are shards in it, or another run begins
            path.parent.rmdir()


def _acquire(path: Path) -> int:
    given_up = time.monotonic() + PATIENCE_S
    while (descriptor := _try(path)) is None:
        if time.monotonic() > given_up:
            holder = path.read_text() if path.exists() else ""
            raise UserError(
                f"another run makes shards in {path.parent} ({holder or 'it has just begun'}): "
                f"wait until it ends, or choose another folder"
            )
        time.sleep(POLL_S)
    return descriptor


def _try(path: Path) -> int | None:
    """The file, open and locked; None if others have it, or are just removing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # they took the folder away
        return None
    if _lock(descriptor, path.parent) and _is_at(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{folder}: its file system has no locks; start no second run there", flush=True)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
