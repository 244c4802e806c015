"""One worker of a run: claims unfinished units and makes their pictures until none is left."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from taming_dist.atomic import write_bytes
from taming_dist.engine.claims import Claims
from taming_dist.engine.outcome import forget_outcome, write_outcome
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.workers import Worker
from taming_dist.formats.files import writing
from taming_dist.formats.npy import from_npy, to_npy
from taming_dist.formats.png import save_png
from taming_dist.generation.pictures import beside_given, image_grid
from taming_dist.sampling.folder import GRID, Folder, require_writable
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.plan import Plan
from taming_dist.sampling.progress import Progress
from taming_dist.sampling.recipe import Recipe, at_present, use_threads
from taming_dist.sampling.thumbnails import GRID_COLUMNS, GRID_IMAGES, Thumbnail, reduced
from taming_dist.sampling.units import Unit, units_of
from taming_dist.sampling.writers import WRITERS, Finished, Writer

LOOK_AGAIN_S = 2.0
OPENING, ENDING = "opening", "ending"
THUMBNAILS = "thumbnails.npy"
Found = TypeVar("Found")


def complete(out: Path, plan: Plan, recipe: Recipe, worker: Worker) -> tuple[bool, str]:
    """Work on the run that `recipe` describes until it is complete in `out`, or until this process
    is asked to stop; gives whether it is complete, and the last line.

    Raises:
        UserError: the folder cannot be used, is another run's, or its disk is full.
    """
    if worker.rank == 0:
        forget_outcome()
    count, batch, image = plan.request.count, plan.batch, recipe.image
    wanted = range(count) if image is None else range(count)[image : image + 1]
    kind = WRITERS[recipe.settings["format"] if image is None else "png"]
    folder = Folder(out, recipe, len(wanted), frozenset(map(kind.file, wanted)))
    if folder.is_complete():
        folder.forget()
        return True, f"{out} is complete, nothing to do: {out / GRID}"
    folder.check()
    require_writable(out)
    claims = Claims(folder.units)
    writer = kind(out, folder.units, claims.worker, lambda index: at_present(recipe).text(index))
    units = units_of(count, batch, folder.units, wanted)

    def finished() -> int:
        return min(folder.num_finished() * batch, len(wanted))

    progress = Progress(len(wanted), finished, silent=worker.number > 0)
    work = Work(plan, folder, writer, units, wanted, claims, progress)
    with stoppable():
        try:
            work.run(worker)
        except Stopped as stopped:
            done = finished()
            if worker.rank == 0:
                write_outcome(done, done, finished=False, reason=f"stopped by {stopped}")
            so_far = f"{done} of {len(wanted)} images are done"
            return False, f"stopped by {stopped}: {so_far}, and the same command continues"
    return True, f"{len(wanted)} images, and all at a glance: {out / GRID}"


@dataclass(frozen=True)
class Work:
    """What a worker needs: `units` of the plan, of which the pictures `wanted` are written to the
    folder."""

    plan: Plan
    folder: Folder
    writer: Writer
    units: Sequence[Unit]
    wanted: range
    claims: Claims
    progress: Progress

    def run(self, worker: Worker) -> None:
        """Work until every unit is finished by any worker; the last one completes the folder.

        Raises:
            UserError: the folder is another run's, or the disk is full.
        """
        try:
            with self.claims, writing(self.folder.out, "out="):
                use_threads(self._alone(OPENING, self.folder.open))
                for unit in self._claimed(worker):
                    self._make(unit)
                self._alone(ENDING, self._complete)
        except FileNotFoundError:
            # The state of the run goes when another worker has completed it.
            if not self.folder.is_complete():
                raise
        if self.folder.is_complete():
            # once more: claims of others may have come while the one who completed it removed it
            self.folder.forget()
        self.progress.end()

    def _alone(self, name: str, act: Callable[[], Found]) -> Found:
        """Do something that one worker does at a time; gives what it gives."""
        while not self.claims.take(name):
            self.progress.look()
            time.sleep(min(LOOK_AGAIN_S, self.claims.stale_s / 2))
        found = act()
        self.claims.release(name)
        return found

    def _claimed(self, worker: Worker) -> Iterator[Unit]:
        """Yield the units that this worker claims; end when all are finished.

        Each begins with a share of its own, and then helps the others; units of workers that die
        are taken over.
        """
        begin = worker.number * len(self.units) // worker.count
        todo = [*self.units[begin:], *self.units[:begin]]
        while todo:
            others = []
            for unit in todo:
                if self.folder.is_finished(unit.number):
                    continue
                if not self.claims.take(unit.name):
                    others.append(unit)
                    continue
                if not self.folder.is_finished(unit.number):
                    yield unit
                self.claims.release(unit.name)
            todo = others
            if todo:
                self.progress.look()
                time.sleep(min(LOOK_AGAIN_S, self.claims.stale_s / 2))

    def _make(self, unit: Unit) -> None:
        unit.told = lambda done: self.progress.look(done * len(unit.images))
        made: list[tuple[Picture, Thumbnail | None]] = []
        self.writer.write(unit.number, self._passing(unit, made))
        small = [thumbnail.pixels().numpy() for _, thumbnail in made if thumbnail is not None]
        if small:
            write_bytes(unit.state(THUMBNAILS), to_npy(np.stack(small)), self.claims.worker)
        images = [{"file": self.writer.file(own.index), **own.facts} for own, _ in made]
        size = made[0][0].height, made[0][0].width
        self.folder.note(Finished(unit.number, size, images), self.claims.worker)
        unit.forget()

    def _passing(
        self, unit: Unit, made: list[tuple[Picture, Thumbnail | None]]
    ) -> Iterator[Picture]:
        """Pass the wanted pictures of a unit on, and note them without their pixels."""
        for picture in self.plan.pictures(unit):
            if picture.index not in self.wanted:
                continue
            small = None
            if picture.index - self.wanted.start < GRID_IMAGES:
                small = Thumbnail(picture.height, picture.width)
                picture = replace(picture, strips=small.passing(picture.strips))
            yield picture
            made.append((replace(picture, strips=()), small))
            unit.told((picture.index + 1 - unit.images.start) / len(unit.images))

    def _complete(self) -> None:
        if self.folder.is_complete():
            return
        finished = [self.folder.finished(unit.number) for unit in self.units]
        self.writer.finish(finished)
        self._write_grid()
        self.folder.complete(finished)

    def _write_grid(self) -> None:
        """Write the first pictures, beside what was given for them."""
        files = [unit.state(THUMBNAILS) for unit in self.units]
        stored = [from_npy(memoryview(file.read_bytes())) for file in files if file.exists()]
        shown = list(torch.from_numpy(np.concatenate(stored)))
        first = self.wanted.start
        pictures, columns = beside_given(
            shown,
            lambda number: [reduced(own) for own in self.plan.beside(first + number)],
            self.plan.period if len(self.wanted) > 1 else 1,
            GRID_COLUMNS,
        )
        save_png(image_grid(torch.stack(pictures), columns), self.folder.out / GRID)
