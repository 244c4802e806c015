"""A checkpoint while it is written: each rank its part, in a thread of its own.

Ranks tell each other by files: training has the process group meanwhile, which two threads must not
use at once. A rank that is done leaves images-N.tmp/part-R.json, with what it wrote or with why it
could not; the first rank waits for all of them.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from taming_dist.atomic import write_bytes
from taming_dist.engine.meta import Meta
from taming_dist.engine.snapshot import Snapshot
from taming_dist.engine.written import Written, sync_folder
from taming_dist.formats.files import cause_of, unwritable

POLL_S = 0.05
LONGEST_S = 1800.0  # that a rank may take longer than the first


class SaveFailed(Exception):
    """A checkpoint could not be written. The message names the folder, the cause and the fix."""


@contextmanager
def failing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a disk, while writing to a folder, into `SaveFailed`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = cause_of(error, folder)
        if cause is None:
            raise
        raise SaveFailed(unwritable(cause, folder)) from error


class GivenUp:
    """Tells a thread that waits for other ranks to wait no longer, and why."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._why = ""

    def tell(self, why: str) -> None:
        self._why = why
        self._told.set()

    def wait(self, seconds: float) -> None:
        """Wait so long; SaveFailed if there is nothing to wait for."""
        if self._told.wait(seconds):
            raise SaveFailed(self._why)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is to become the folder `final`, as this rank has it in memory.

    `meta` lacks the files. `beside`: what the first rank writes before the checkpoint appears.
    """

    final: Path
    meta: Meta
    snapshots: Mapping[str, Snapshot]
    rank: int
    beside: Callable[[], None] = _nothing

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.final.with_name(f"{self.final.name}.tmp")

    def write_part(self) -> dict[str, Written]:
        """Write what this rank has; gives its files by path inside the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Written] = {}
        for name, snapshot in self.snapshots.items():
            written = snapshot.write(self.folder / name)
            files |= {f"{name}/{file}": facts for file, facts in written.items()}
            sync_folder(self.folder / name)
        if self.rank > 0:
            self._tell({"files": {name: asdict(facts) for name, facts in files.items()}})
        return files

    def other_parts(self, given_up: GivenUp) -> dict[str, Written]:
        """Wait until all other ranks have written their parts; gives their files.

        Raises:
            SaveFailed: one of them cannot, or does not.
        """
        files: dict[str, Written] = {}
        missing = list(range(1, self.meta.world_size))
        end = time.monotonic() + LONGEST_S
        while missing:
            rank = missing[0]
            if not self._part(rank).is_file():
                given_up.wait(POLL_S)
                if time.monotonic() > end:
                    raise SaveFailed(
                        f"rank {rank} has not written its part of {self.folder} within "
                        f"{LONGEST_S:.0f} s: look at the disk of its node"
                    )
                continue
            told = json.loads(self._part(rank).read_bytes())
            if "fault" in told:
                raise SaveFailed(f"rank {rank}: {told['fault']}")
            files |= {name: Written(**facts) for name, facts in told["files"].items()}
            self._part(rank).unlink()
            missing.pop(0)
        return files

    def abandon(self, fault: str) -> None:
        """Make room: the first rank removes all of it, others their files, and tell the first."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        with suppress(OSError):  # then the first learns it when the ranks next meet
            for path in self.folder.glob(f"*/rank-{self.rank:05d}-*"):
                path.unlink()
            self._tell({"fault": fault})

    def _tell(self, what: dict[str, Any]) -> None:
        write_bytes(self._part(self.rank), json.dumps(what, allow_nan=False).encode())

    def _part(self, rank: int) -> Path:
        return self.folder / f"part-{rank:05d}.json"
