"""Dividing work without a server: lease files in a folder that all workers share.

A claim is a file that only one worker can create (O_EXCL), and whose modification time it renews
while it works. A claim that was not renewed for a while belongs to a dead worker and may be taken
over. If two workers ever hold the same claim, both do the work: that only costs time, because both
make the same bytes and only the first result is kept.
"""

import json
import os
import socket
import threading
from pathlib import Path
from types import TracebackType

# Longer than NFS may cache file attributes (60 s) plus the delay of a renewal.
STALE_S = 120.0
NOBODY = "", 0


class Claims:
    """This worker's claims in `folder`, renewed by a thread while used as a context manager.

    `stale_s`: seconds without renewal after which a claim counts as abandoned. Ages are measured
    by the file system's clock, so the nodes' clocks need not agree. A worker on this host whose
    process is gone is known to be dead at once.
    """

    def __init__(self, folder: Path, stale_s: float = STALE_S) -> None:
        self._here = socket.gethostname(), os.getpid()
        self.worker = "{}-{}".format(*self._here)
        self._folder, self.stale_s = folder, stale_s
        self._clock = folder / f"{self.worker}.clock"
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._renewing.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._renewing.join()
        for path in list(self._held):
            # one that is still empty is ours as a rule: we were stopped before its first line
            if _owner(path) in (self._here, NOBODY):
                path.unlink(missing_ok=True)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Claim a piece of work; False if a live worker holds it."""
        path = self._folder / f"{name}.claim"
        # before there is a file: a signal may raise between any two lines
        self._held.add(path)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            self._held.discard(path)
            if not self._is_abandoned(path):
                return False
            path.unlink(missing_ok=True)
            return self.take(name)
        with os.fdopen(descriptor, "w") as file:
            host, pid = self._here
            json.dump({"host": host, "pid": pid}, file, allow_nan=False)
        return True

    def release(self, name: str) -> None:
        """Release a claim, unless another worker has taken it over."""
        path = self._folder / f"{name}.claim"
        if _owner(path) == self._here:
            path.unlink(missing_ok=True)
        self._held.discard(path)

    def _is_abandoned(self, path: Path) -> bool:
        host, pid = _owner(path)
        if host == self._here[0] and not _is_running(pid):
            return True
        try:
            renewed = path.stat().st_mtime
        except FileNotFoundError:
            return True
        self._clock.touch()
        return self._clock.stat().st_mtime - renewed > self.stale_s

    def _renew(self) -> None:
        while not self._stop.wait(self.stale_s / 6):
            for path in list(self._held):
                try:
                    os.utime(path)
                except OSError:
                    # It was taken over, or the disk is briefly unavailable: work continues.
                    continue


def _owner(path: Path) -> tuple[str, int]:
    """Host and process of a claim; NOBODY while it is being written or after it is gone."""
    try:
        record = json.loads(path.read_text())
        return str(record["host"]), int(record["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return NOBODY


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
