"""Checkpoints: folders that are either whole or not there, named after the images seen.

Layout: checkpoints/images-000000012000/ holds a folder per engine (`taming_dist.engine.pieces`) and
meta.json, written last: step, state and the list of files with their sizes and xxh3. It is built as
images-*.tmp (`taming_dist.engine.draft`) and renamed, so a run that dies while saving leaves the
previous checkpoint as the newest valid one. Steps would not do for names: with another global batch
they count anew. Any number of ranks and any ZeRO stage reads it. Runs of before have DeepSpeed's
files, which only as many ranks at the same stage can read, and folders such as step-00001000, whose
images are in their meta.json.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from taming_dist.engine.draft import Draft, GivenUp, SaveFailed, failing
from taming_dist.engine.finding import (
    ASIDE,
    all_checkpoints,
    find_fault,
    find_fault_within,
    read_state,
    remove,
    whole_checkpoints,
)
from taming_dist.engine.meta import Meta, read_meta, write_meta
from taming_dist.engine.snapshot import Snapshot
from taming_dist.engine.written import Written, sync_folder
from taming_dist.errors import UserError


class NotFinite(Exception):
    """Something that a checkpoint would keep is not finite; the message says what."""


class NotTheSame(Exception):
    """Ranks hold different weights; the message says which."""


class Saved(Protocol):
    """What a checkpoint needs of an engine: see `taming_dist.engine.zero.Engine`."""

    def snapshot(self) -> Snapshot: ...
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
    """The checkpoints of a run. All ranks call its methods together; `write` may be in a thread.

    The `keep_last` newest by images seen are kept, and that of every `keep_every`-th step for good
    (0: none). Which those are is decided and noted when they are saved, because the same images are
    another step after the global batch was changed.
    """

    folder: Path
    world: Ranks
    keep_last: int = 2
    keep_every: int = 0

    def begin(self, step: int, engines: Mapping[str, Saved], state: dict[str, Any]) -> Draft:
        """Copy what a checkpoint after `step` optimizer steps is made of; `write` writes it.

        `state` is plain JSON and is given back by `load`; its `images` are the images seen.

        Raises:
            NotFinite: it is not worth keeping.
            NotTheSame: ranks have come apart.
        """
        final = self.folder / f"images-{state['images']:012d}"
        if self.world.is_first:
            shutil.rmtree(final.with_name(f"{final.name}.tmp"), ignore_errors=True)
        self.world.barrier()
        try:
            json.dumps(state, allow_nan=False)
        except ValueError as error:
            raise NotFinite(f"what the recipe remembers ({error})") from error
        snapshots = {}
        for name, engine in engines.items():
            snapshots[name] = engine.snapshot()
            if snapshots[name].not_finite is not None:
                raise NotFinite(f"{snapshots[name].not_finite} of the {name}")
            if snapshots[name].difference is not None:
                raise NotTheSame(f"the {name}'s {snapshots[name].difference}")
        meta = Meta(step, self.world.world_size, state, kept_for_good=self._is_kept(step))
        return Draft(final, meta, snapshots, self.world.rank)

    def write(self, draft: Draft, given_up: GivenUp) -> None:
        """Write this rank's part of a checkpoint; the first rank waits for the others, and puts the
        whole in place. No collective: a thread of its own may do it.

        Raises:
            SaveFailed: some rank's disk does not take it. Nothing of it is left.
        """
        try:
            with failing(self.folder):
                files = draft.write_part()
                if not self.world.is_first:
                    return
                draft.beside()
                files |= draft.other_parts(given_up)
                self._put_in_place(draft, files)
        except SaveFailed as error:
            draft.abandon(str(error))
            raise
        self.prune(draft.final)

    def _put_in_place(self, draft: Draft, files: dict[str, Written]) -> None:
        """Have the checkpoint appear, whole. One of before of the same images, as a run leaves that
        was sent back to an earlier step, steps aside first, where it is found if this is cut."""
        write_meta(draft.folder, dataclasses.replace(draft.meta, files=files))
        sync_folder(draft.folder)
        aside = draft.final.with_name(f"{draft.final.name}{ASIDE}")
        if draft.final.exists():
            remove(aside)
            os.rename(draft.final, aside)
        os.rename(draft.folder, draft.final)
        sync_folder(self.folder)
        remove(aside)

    def latest_valid(self, report: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, as rank 0 sees it, whose files are as they were written and
        whose numbers are finite; newer ones that are not are reported. None: there is none yet.

        Raises:
            UserError: there are whole ones, of which none can be used.
        """
        whole = list(whole_checkpoints(self.folder, report)) if self.world.is_first else []
        found, fault = self.world.broadcast(whole), ""
        for path in found:
            faults = [fault for fault in self.world.gather(self._fault_within(path)) if fault]
            if not faults:
                return path
            fault = f"{path.name}: {faults[0]}"
            if self.world.is_first:
                report(f"skipping checkpoint {fault}")
        if found:
            raise UserError(
                f"{self.folder} holds no checkpoint that can be used (the last is {fault}): bring "
                f"one back from a copy, or choose another run.name"
            )
        return None

    def _fault_within(self, path: Path) -> str | None:
        """What is wrong within this rank's share of a checkpoint's files, or None."""
        files = read_meta(path).files
        for name in list(files)[self.world.rank :: self.world.world_size]:
            fault = find_fault_within(path / name, files[name])
            if fault is not None:
                return f"{name} {fault}"
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
        """Delete what is not to be kept, and never `saved`, which was written just now."""
        whole = [path for path in all_checkpoints(self.folder) if find_fault(path) is None]
        for path in whole[: -max(1, self.keep_last)]:
            meta = read_meta(path)
            kept = meta.kept_for_good
            if kept is None:  # those of before noted the step only; it is that of the batch of then
                kept = self._is_kept(meta.step)
            if path != saved and not kept:
                remove(path)

    def _is_kept(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0
