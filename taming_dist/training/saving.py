"""Saving while training continues: a step waits for a copy only, and a thread writes it.

At most one save is in flight. Ranks agree on what became of it where they meet: before the next one
and at the end.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from taming_dist.engine.checkpoint import Checkpoints, NotFinite, NotTheSame
from taming_dist.engine.draft import LONGEST_S, Draft, GivenUp, SaveFailed, failing
from taming_dist.engine.finding import newest_valid
from taming_dist.engine.outcome import write_outcome
from taming_dist.engine.world import World
from taming_dist.errors import Diverged, UserError
from taming_dist.formats.files import writing
from taming_dist.training.clock import Clock
from taming_dist.training.export import Export, is_exported
from taming_dist.training.recipe import Recipe
from taming_dist.training.sinks import Sinks
from taming_dist.training.watchdog import Progress

MOST_FAILED = 3  # saves in a row
POLL_S = 0.1  # ranks that wait for others ask each other so often
# How long a run that ends by an error waits for what it is writing, and for other ranks to do so.
LAST_WAIT_S, LAST_WAIT_FOR_OTHERS_S = 60.0, 5.0


class Job:
    """A save in flight: this rank's thread, and what became of it.

    `clock`: the moment that is saved; `stall`: the seconds for which training has waited.
    """

    def __init__(
        self, draft: Draft, clock: Clock, stall: float, write: Callable[[Draft, GivenUp], None]
    ) -> None:
        self.draft, self.clock, self.stall = draft, clock, stall
        self.given_up = GivenUp()
        self.told = False
        self.seconds = 0.0  # until the thread was done
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(write,), daemon=True)
        self._thread.start()

    def _work(self, write: Callable[[Draft, GivenUp], None]) -> None:
        start = time.perf_counter()
        try:
            write(self.draft, self.given_up)
        except BaseException as error:  # for the main thread
            self._error = error
        self.seconds = time.perf_counter() - start

    def wait(self, seconds: float) -> None:
        """Wait until the thread is done, at most so long."""
        self._thread.join(seconds)

    def outcome(self) -> str | None:
        """Empty if this rank is done, its fault if the save has failed, None while it is in flight;
        any other error is raised."""
        if self._thread.is_alive():
            return None
        if self._error is None:
            return ""
        if isinstance(self._error, SaveFailed):
            return str(self._error)
        raise self._error


class Saver:
    """Writes checkpoints, and beside each the model that it has (`export`, a folder)."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        export: Path,
        sinks: Sinks,
        progress: Progress,
        world: World,
    ) -> None:
        self._checkpoints, self._export, self._sinks = checkpoints, export, sinks
        self._progress, self._world = progress, world
        self._job: Job | None = None
        self._faults: list[str] = []  # of the last saves, in a row

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """After an error, let what is being written be finished; a second Ctrl-C does not wait."""
        if error is None or self._job is None or isinstance(error, SystemExit):
            return
        self._job.wait(LAST_WAIT_FOR_OTHERS_S)  # one of them may be gone
        self._job.given_up.tell("the run has ended by an error")
        self._job.wait(LAST_WAIT_S)
        if self._job.outcome() == "":
            self.tell()

    def save(self, clock: Clock, recipe: Recipe, state: dict[str, Any]) -> None:
        """Begin to save the present moment, once the save before is done (collective). `state` is
        plain JSON, with the `images` seen.

        Raises:
            Diverged: it is not worth keeping.
            UserError: too many saves in a row have failed.
        """
        start = time.perf_counter()
        self.settle()
        self._progress.begin("saving")
        try:
            draft = self._checkpoints.begin(clock.step, recipe.engines, state)
        except NotFinite as error:
            raise Diverged(
                f"step {clock.step}: {error} is not finite, so nothing was saved; {self._last()}. "
                f"Try a smaller optim.lr, engine.precision=fp32 or optim.clip=1"
            ) from error
        except NotTheSame as error:
            raise Diverged(
                f"step {clock.step}: {error}, so nothing was saved; {self._last()}. The same "
                f"command resumes there; if it comes back, the memory or network of that node is "
                f"at fault"
            ) from error
        export = recipe.export()
        if export is not None:
            exported = next(iter(recipe.engines))
            meta = replace(draft.meta, exported=exported, model=export.described)
            draft = replace(draft, meta=meta, beside=lambda: self._write_export(export))
        stall = time.perf_counter() - start
        self._job = Job(draft, replace(clock), stall, self._checkpoints.write)

    def _write_export(self, export: Export) -> None:
        with failing(self._export):
            export.write(self._export)

    def _last(self) -> str:
        """Which checkpoint there is, the same on all ranks."""
        last = newest_valid(self._checkpoints.folder, lambda _: None)
        last = self._world.broadcast(last)
        return f"the last good checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def tell(self) -> None:
        """Tell what became of the save in flight, if this rank knows already."""
        job = self._job
        if job is None or job.told or not self._world.is_first:
            return
        fault = job.outcome()
        if fault is None:
            return
        job.told = True
        name, seconds = job.draft.final.name, {"stall_s": job.stall, "duration_s": job.seconds}
        if not fault:
            self._sinks.event("save", job.clock, checkpoint=name, **seconds)
            # what a script knows of a run that is killed later: how far it came
            write_outcome(job.clock.step, job.clock.images, finished=False, reason=f"saved {name}")
            return
        self._sinks.event("save_failed", job.clock, checkpoint=name, reason=fault, **seconds)
        self._sinks.note(
            f"checkpoint {name} was not saved: {fault}; the next one is tried when it is due "
            f"({len(self._faults) + 1} of {MOST_FAILED} failures in a row)"
        )

    def settle(self) -> None:
        """Wait until the save in flight is done on all ranks (collective). They ask each other
        again and again rather than wait in one collective, which has a time limit.

        Raises:
            UserError: too many saves in a row have failed.
        """
        if self._job is None:
            return
        job, end = self._job, time.monotonic() + LONGEST_S
        while True:
            self._progress.begin("waiting for a save")
            job.wait(POLL_S)
            told = self._world.gather((job.outcome(), time.monotonic() > end))
            outcomes = [outcome for outcome, _ in told]
            faults = [by(rank, fault) for rank, fault in enumerate(outcomes) if fault]
            if None not in outcomes:
                break
            if faults:
                job.given_up.tell(faults[0])
            if any(late for _, late in told):
                slow = outcomes.index(None)
                raise UserError(
                    f"rank {slow} still writes {job.draft.folder} after {LONGEST_S:.0f} s: look at "
                    f"the disk of its node, then run the same command again"
                )
        self.tell()
        self._job = None
        if not faults:
            self._faults = []
            return
        if self._world.is_first:
            job.draft.abandon(faults[0])  # what others wrote after the first one had removed it
        self._faults.append(faults[0])
        if len(self._faults) >= MOST_FAILED:
            raise UserError(
                f"{MOST_FAILED} checkpoints in a row could not be saved: {self._faults[-1]}, then "
                f"run the same command again"
            )

    def finish(self) -> None:
        """Wait for the last save of a run, without which it would not have ended well (collective).

        Raises:
            UserError: it has failed.
        """
        self.settle()
        if self._faults:
            raise UserError(f"{self._faults[-1]}, then run the same command again")


def make_up_export(recipe: Recipe, folder: Path, world: World) -> None:
    """Export a resumed model where that was deleted (collective): a run that has nothing left to do
    would not come to it."""
    if world.broadcast(is_exported(folder)):
        return
    export = recipe.export()
    if export is not None:
        with writing(folder):
            export.write(folder)


def by(rank: int, fault: str) -> str:
    """A fault of a rank, as the first one tells it."""
    return f"rank {rank}: {fault}" if rank else fault


def keep_best(export: Export | None, folder: Path, sinks: Sinks, clock: Clock) -> None:
    """Write the best model so far; where the disk does not take it, say so: the next better one is
    tried again."""
    if export is None:
        return
    try:
        with failing(folder):
            export.write(folder)
    except SaveFailed as error:
        sinks.event("save_failed", clock, reason=str(error))
        sinks.note(f"the best model was not kept: {error}; the next better one is tried again")
