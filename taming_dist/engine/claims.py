"""Dividing work without a server: lease files in a folder that all workers share.

A claim is a file that only one worker can create (O_EXCL), and whose modification time it renews
while it works. A claim that was not renewed for a while belongs to a dead worker and may be taken
over. If two workers ever hold the same piece of work, both do it: that only costs time, because
both make the same bytes and only the first result is kept. (Of a run there is only one, see
training/lock.py.)
"""

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from taming_dist.processes import Process, this_process

# Longer than NFS may cache file attributes (60 s) plus the delay of a renewal.
STALE_S = 120.0
NOBODY = Process("", 0)


@dataclass(frozen=True)
class Claim:
    """What is known of a claim that somebody has: the worker, since when by its own clock, when it
    was renewed by the file system's, and the Slurm job that it is part of."""

    owner: Process
    since: str
    renewed: float
    job: str = ""


class Claims:
    """This worker's claims in `folder`, renewed by a thread while used as a context manager.

    `stale_s`: seconds without renewal after which a claim counts as abandoned. Ages are measured
    by the file system's clock, so the nodes' clocks need not agree (where it has one of its own;
    `take` can be given a better judge). Of a worker on this host it is known whether it runs.
    `lost` is called by the thread, with the name of a claim of ours that it finds to be somebody
    else's.
    """

    def __init__(
        self,
        folder: Path,
        stale_s: float = STALE_S,
        lost: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._here = this_process()
        self.worker = f"{self._here.host}-{self._here.pid}"
        self._lost = lost
        self._folder, self.stale_s = folder, stale_s
        self._clock = folder / f"{self.worker}.clock"
        self._held: set[Path] = set()  # perhaps: those that `take` tries for are among them
        self._taken: set[Path] = set()
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
        with suppress(OSError):  # a disk that is gone by now: what is not renewed is abandoned
            for path in list(self._held):
                # one that is still empty is ours as a rule: we were stopped before its first line
                if _owner(path) in (self._here, NOBODY):
                    path.unlink(missing_ok=True)
            self._clock.unlink(missing_ok=True)

    def take(self, name: str, is_dead: Callable[[Claim], bool] | None = None) -> bool:
        """Claim a piece of work; False if a live worker holds it. `is_dead`: who judges that."""
        path = self._path(name)
        # before there is a file: a signal may raise between any two lines
        self._held.add(path)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            self._held.discard(path)
            is_gone = self._bury(path, is_dead or self._is_abandoned)
            return is_gone and self.take(name, is_dead)
        with os.fdopen(descriptor, "w") as file:
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            facts = {"since": since, "job": os.environ.get("SLURM_JOB_ID", "")}
            json.dump(asdict(self._here) | facts, file, allow_nan=False)
        self._taken.add(path)
        return True

    def find(self, name: str) -> Claim | None:
        """Who has a claim; None if nobody has."""
        return _read(self._path(name))

    def release(self, name: str) -> None:
        """Release a claim, unless another worker has taken it over."""
        path = self._path(name)
        if _owner(path) == self._here:
            path.unlink(missing_ok=True)
        self._held.discard(path)
        self._taken.discard(path)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.claim"

    def _bury(self, path: Path, is_dead: Callable[[Claim], bool]) -> bool:
        """Remove a claim if it is abandoned, and no other; whether it is gone."""
        found = _read(path)
        if found is None:
            return True
        if not is_dead(found):
            return False
        # Another worker may have buried it before us, and put its own there: a name of our own
        # for what we remove shows which it was.
        grave = path.with_name(f"{path.name}.{self.worker}")
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return True
        try:
            if _owner(grave) != found.owner:
                os.rename(grave, path)
                return False
        finally:
            grave.unlink(missing_ok=True)
        return True

    def _is_abandoned(self, claim: Claim) -> bool:
        if claim.owner.is_here:
            return not claim.owner.is_running
        self._clock.touch()
        return self._clock.stat().st_mtime - claim.renewed > self.stale_s

    def _renew(self) -> None:
        while not self._stop.wait(self.stale_s / 6):
            for path in list(self._held):
                try:
                    if _owner(path) in (self._here, NOBODY):
                        os.utime(path)
                        continue
                except OSError:
                    # It was removed, or the disk is briefly unavailable: work continues.
                    continue
                if path in self._taken:
                    self._held.discard(path)
                    self._taken.discard(path)
                    self._lost(path.stem)


def _read(path: Path) -> Claim | None:
    """A claim; one by NOBODY while it is being written, None if there is none."""
    try:
        renewed = path.stat().st_mtime
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
        owner = Process(str(record["host"]), int(record["pid"]), str(record.get("birth", "")))
        return Claim(owner, str(record.get("since", "")), renewed, str(record.get("job", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Claim(NOBODY, "", renewed)


def _owner(path: Path) -> Process:
    """The worker of a claim; NOBODY while it is being written or after it is gone."""
    try:
        found = _read(path)
    except OSError:
        return NOBODY
    return NOBODY if found is None else found.owner
