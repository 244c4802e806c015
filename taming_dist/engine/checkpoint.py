"""Checkpoints: folders that are either whole or not there, named after the images seen.

Layout: checkpoints/images-000000012000/ holds a folder per engine (DeepSpeed's files) and
meta.json, written last: step, state and the list of files with their sizes. It is built as
images-*.tmp and renamed, so a run that dies while saving leaves the previous checkpoint as the
newest valid one. Steps would not do for names: with another global batch they count anew. Runs of
before have folders such as step-00001000, whose images are in their meta.json.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from taming_dist.errors import UserError

NAME = re.compile(r"images-(\d{12,})")
NAME_OF_BEFORE = re.compile(r"step-(\d{8,})")
UNFINISHED = ("images-*.tmp", "step-*.tmp")
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

    The `keep_last` newest by images seen are kept, and that of every `keep_every`-th step for good
    (0: none). Which those are is decided and noted when they are saved, because the same images are
    another step after the global batch was changed.
    """

    folder: Path
    world: Ranks
    keep_last: int = 2
    keep_every: int = 0

    def save(self, step: int, engines: Mapping[str, Saved], state: dict[str, Any]) -> Path:
        """Write a checkpoint, after `step` optimizer steps.

        `state` is plain JSON and is given back by `load`; its `images` are the images seen.
        """
        final = self.folder / f"images-{state['images']:012d}"
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
            self.prune(final)
        self.world.barrier()
        return final

    def _finish(self, building: Path, final: Path, step: int, state: dict[str, Any]) -> None:
        files = sorted(path for path in building.rglob("*") if path.is_file())
        for path in files:
            _sync(path)
        meta = {
            "format": FORMAT,
            "step": step,
            "kept_for_good": self._is_kept(step),
            "world_size": self.world.world_size,
            "state": state,
            "files": {str(path.relative_to(building)): path.stat().st_size for path in files},
        }
        with open(building / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1, allow_nan=False)
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

    def prune(self, saved: Path) -> None:
        """Delete what is not to be kept, and never `saved`, which was written just now.

        meta.json goes first: no torn folder ever looks whole.
        """
        whole = [path for path in all_checkpoints(self.folder) if find_fault(path) is None]
        for path in whole[: -max(1, self.keep_last)]:
            meta = read_meta(path)
            # Runs of before noted the step only; it is that of the global batch of then.
            if path != saved and not meta.get("kept_for_good", self._is_kept(meta["step"])):
                _remove(path)

    def _is_kept(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, by images seen."""
    if not folder.is_dir():
        return []
    names = (NAME, NAME_OF_BEFORE)
    found = (path for path in folder.iterdir() if any(name.fullmatch(path.name) for name in names))
    return sorted(found, key=lambda path: (_images(path), NAME.fullmatch(path.name) is not None))


def remove_unfinished(folder: Path) -> None:
    """Delete what runs that died while saving have left: each is as large as a checkpoint."""
    for pattern in UNFINISHED:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


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
            f"{path} was written by a run on {meta['world_size']} ranks, and this one is on "
            f"{world_size}: resume on {meta['world_size']}, or name another run.dir"
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


def _images(path: Path) -> float:
    """Images seen. A folder of before whose meta.json cannot be read may be the newest: infinity,
    so that it is reported rather than passed over in silence."""
    match = NAME.fullmatch(path.name)
    if match is not None:
        return int(match[1])
    try:
        return read_meta(path)["state"]["images"]
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def _remove(path: Path) -> None:
    (path / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
