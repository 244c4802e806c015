"""Checkpoints: folders that are either whole or not there, named after the images seen.

Layout: checkpoints/images-000000012000/ holds a folder per engine (`taming_dist.engine.pieces`) and
meta.json, written last: step, state and the list of files with their sizes and xxh3. It is built as
images-*.tmp and renamed, so a run that dies while saving leaves the previous checkpoint as the
newest valid one. Steps would not do for names: with another global batch they count anew. Any
number of ranks and any ZeRO stage reads it. Runs of before have DeepSpeed's files, which only as
many ranks at the same stage can read, and folders such as step-00001000, whose images are in their
meta.json.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from taming_dist.errors import UserError
from taming_dist.formats.shards import measure

NAME = re.compile(r"images-(\d{12,})")
NAME_OF_BEFORE = re.compile(r"step-(\d{8,})")
UNFINISHED = ("images-*.tmp", "step-*.tmp")
FORMAT, FORMER = "taming_dist.checkpoint.v2", "taming_dist.checkpoint.v1"


class Saved(Protocol):
    """What a checkpoint needs of an engine: see `taming_dist.engine.zero.Engine`."""

    def save(self, folder: Path, name: str) -> list[Path]: ...
    def load(self, folder: Path, name: str) -> None: ...


class Ranks(Protocol):
    """What a checkpoint needs of the world."""

    @property
    def is_first(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def gather(self, value: Any) -> list[Any]: ...
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
        files: dict[str, Any] = {}
        for name, engine in engines.items():
            for path in engine.save(building, name):
                _sync(path)
                size, digest = measure(path)
                files[str(path.relative_to(building))] = {"bytes": size, "xxh3_128": digest}
        written = self.world.gather(files)
        if self.world.is_first:
            everyones = {name: facts for files in written for name, facts in files.items()}
            self._finish(building, final, step, state, everyones)
            self.prune(final)
        self.world.barrier()
        return final

    def _finish(
        self, building: Path, final: Path, step: int, state: dict[str, Any], files: dict[str, Any]
    ) -> None:
        meta = {
            "format": FORMAT,
            "step": step,
            "kept_for_good": self._is_kept(step),
            "world_size": self.world.world_size,
            "state": state,
            "files": dict(sorted(files.items())),
        }
        with open(building / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1, allow_nan=False)
        _sync(building / "meta.json")
        _remove(final)  # left by a run that was sent back to an earlier step
        os.replace(building, final)
        _sync(self.folder)

    def latest_valid(self, report: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, as rank 0 sees it, whose files are as they were written;
        broken newer ones are reported."""
        found = list(whole_checkpoints(self.folder, report)) if self.world.is_first else []
        for path in self.world.broadcast(found):
            altered = [fault for fault in self.world.gather(self._altered(path)) if fault]
            if not altered:
                return path
            if self.world.is_first:
                report(f"skipping checkpoint {path.name}: {altered[0]}")
        return None

    def _altered(self, path: Path) -> str | None:
        """Which of this rank's share of a checkpoint's files is not what was written, or None."""
        files = read_meta(path)["files"]
        for name in list(files)[self.world.rank :: self.world.world_size]:
            facts = files[name]
            if isinstance(facts, dict) and measure(path / name)[1] != facts["xxh3_128"]:
                return f"{name} was altered: its xxh3 is not the one in meta.json"
        return None

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
    return next(whole_checkpoints(folder, report), None)


def whole_checkpoints(folder: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """Yield the checkpoints in `folder` whose files are all there, the newest first; broken ones
    are reported."""
    for path in reversed(all_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None:
            yield path
        else:
            report(f"skipping checkpoint {path.name}: {fault}")


def read_meta(path: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint folder."""
    with open(path / "meta.json", encoding="utf-8") as file:
        return json.load(file)


def read_state(path: Path, world_size: int) -> dict[str, Any]:
    """The state in a checkpoint; UserError if it is of before and only as many ranks as wrote it
    can read it."""
    meta = read_meta(path)
    if meta.get("format") == FORMER and meta["world_size"] != world_size:
        raise UserError(
            f"{path} was written by a former version on {meta['world_size']} ranks, and this run "
            f"is on {world_size}: resume once on {meta['world_size']}; what that saves any number "
            f"can read"
        )
    return meta["state"]


def find_fault(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        meta = read_meta(path)
        files = meta["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"meta.json is missing or broken ({type(error).__name__})"
    for name, facts in files.items():
        size = facts["bytes"] if isinstance(facts, dict) else facts  # of before: sizes only
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
