"""Checkpoints: a folder per step that is either whole or not there.

Layout: checkpoints/step-00001000/ holds a folder per engine (DeepSpeed's files) and meta.json,
written last: step, state and the list of files with their sizes. It is built as step-*.tmp and
renamed, so a run that dies while saving leaves the previous checkpoint as the newest valid one.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from taming_dist.errors import UserError

NAME = re.compile(r"step-(\d{8,})")
FORMAT = "taming_dist.checkpoint.v1"


class Saved(Protocol):
    """What a checkpoint needs of an engine: see `taming_dist.engine.zero.Engine`."""

    def save(self, folder: Path, name: str) -> None: ...
    def load(self, folder: Path, name: str) -> None: ...


class Ranks(Protocol):
    """What a checkpoint needs of the world."""

    @property
    def is_first(self) -> bool: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self) -> None: ...
    def broadcast(self, value: Any) -> Any: ...


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a run. Every method is a collective: all ranks call it.

    `keep_last` newest are kept, and every `keep_every`-th step for good (0: none).
    """

    folder: Path
    world: Ranks
    keep_last: int = 2
    keep_every: int = 0

    def save(self, step: int, engines: Mapping[str, Saved], state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`; `state` is plain JSON and is given back by `load`."""
        final = self.folder / f"step-{step:08d}"
        building = final.with_name(final.name + ".tmp")
        if self.world.is_first:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        self.world.barrier()
        for name, engine in engines.items():
            engine.save(building, name)
        self.world.barrier()
        if self.world.is_first:
            self._finish(building, final, step, state)
            self.prune()
        self.world.barrier()
        return final

    def _finish(self, building: Path, final: Path, step: int, state: dict[str, Any]) -> None:
        files = sorted(path for path in building.rglob("*") if path.is_file())
        for path in files:
            _sync(path)
        meta = {
            "format": FORMAT,
            "step": step,
            "world_size": self.world.world_size,
            "state": state,
            "files": {str(path.relative_to(building)): path.stat().st_size for path in files},
        }
        with open(building / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
        _sync(building / "meta.json")
        _remove(final)  # left by a run that was sent back to an earlier step
        os.replace(building, final)
        _sync(self.folder)

    def latest_valid(self, report: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, as rank 0 sees it; broken newer ones are reported."""
        found = newest_valid(self.folder, report) if self.world.is_first else None
        return self.world.broadcast(found)

    def load(self, path: Path, engines: Mapping[str, Saved]) -> dict[str, Any]:
        """Load every engine from `path`; gives the state that `save` was given."""
        state = read_state(path, self.world.world_size)
        absent = sorted(name for name in engines if not (path / name).is_dir())
        if absent:
            raise UserError(
                f"{path} holds no {' and '.join(absent)}: it is a checkpoint of another "
                f"stage or loss; name another run.dir"
            )
        for name, engine in engines.items():
            engine.load(path, name)
        return state

    def prune(self) -> None:
        """Delete what is not to be kept; meta.json goes first: no torn folder ever looks whole.

        What runs that died while saving left goes too: it is as large as a checkpoint.
        """
        for path in self.folder.glob("step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        whole = [path for path in all_checkpoints(self.folder) if find_fault(path) is None]
        for path in whole[: -max(1, self.keep_last)]:
            if not (self.keep_every and _step(path) % self.keep_every == 0):
                _remove(path)


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, by step."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_step)


def newest_valid(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; broken newer ones are reported."""
    for path in reversed(all_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None:
            return path
        report(f"skipping checkpoint {path.name}: {fault}")
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint folder."""
    with open(path / "meta.json", encoding="utf-8") as file:
        return json.load(file)


def read_state(path: Path, world_size: int) -> dict[str, Any]:
    """The state in a checkpoint; UserError if it was written by another number of ranks."""
    meta = read_meta(path)
    if meta["world_size"] != world_size:
        raise UserError(
            f"{path} was written by {meta['world_size']} ranks and this run has {world_size}: "
            f"resume on as many, or name another run.dir"
        )
    return meta["state"]


def find_fault(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        meta = read_meta(path)
        files = meta["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"meta.json is missing or broken ({type(error).__name__})"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(path: Path) -> None:
    (path / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
