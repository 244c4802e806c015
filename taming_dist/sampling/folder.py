"""The folder of a run, which its workers share: whose it is, what is finished, what is there.

While a run is unfinished, <out>/.units has its recipe, a record of each finished unit, claims, and
what units keep. samples.json comes last: it says that the folder is complete, and how the pictures
were made. Two runs are never mixed, and only files that a record names are ever removed.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming_dist.errors import UserError
from taming_dist.formats.strict_json import write_json
from taming_dist.sampling.recipe import Recipe, fault_of
from taming_dist.sampling.writers import WRITERS
from taming_dist.sampling.writers.interface import Finished

UNITS = ".units"
RECORD, GRID = "samples.json", "grid.png"
RECIPE, REPLACED = "recipe.json", "replaced.json"  # in .units
OURS = re.compile("|".join([re.escape(GRID), *(own.pattern for own in WRITERS.values())]))


@dataclass(frozen=True)
class Folder:
    """The folder `out` of the run that `recipe` describes; `names`: the files of its `count`
    pictures."""

    out: Path
    recipe: Recipe
    count: int
    names: frozenset[str]

    @property
    def units(self) -> Path:
        """Where the state of an unfinished run lies."""
        return self.out / UNITS

    def is_complete(self) -> bool:
        """Whether this very run is finished, and all of its files are there."""
        done = _read(self.out / RECORD)
        return self._is_ours(done) and self.names <= set(_names(self.out))

    def check(self) -> None:
        """Look, without changing anything, whether the run may begin here or be continued.

        Raises:
            UserError: there are an unfinished run of another recipe, a larger finished one, or
                files of nobody's that this run would replace.
        """
        begun = _read(self.units / RECIPE)
        if self._is_ours(begun):
            return
        if begun is not None:
            raise UserError(
                f"out: {self.out} has an unfinished run of other settings"
                f"{self._differs(begun)}: run its command again to finish it, give another "
                f"folder, or remove this one"
            )
        earlier = self._earlier()
        if len(earlier) > self.count:
            raise UserError(
                f"out: {self.out / earlier[-1]} is of an earlier, larger run; remove it or give "
                f"another folder"
            )
        mine = self.names | {GRID, RECORD}
        foreign = sorted((mine & set(_names(self.out))) - {*earlier, *_beside(earlier)})
        if foreign:
            raise UserError(
                f"out: {self.out / foreign[0]} is there already, and no samples.json says that a "
                f"run made it: give another folder, or remove it"
            )

    def open(self) -> Recipe:
        """Make the folder this run's, one worker at a time: remove an earlier run that is finished,
        and note the recipe. Returns that of the worker who began.

        Raises:
            UserError: see `check`.
        """
        self.check()
        begun = _read(self.units / RECIPE)
        if begun is not None:
            return Recipe.parse(begun, RECIPE)
        if (self.out / RECORD).exists():
            os.replace(self.out / RECORD, self.units / REPLACED)
        earlier = self._earlier()
        for name in {*earlier, *_beside(earlier)} - {RECORD}:
            (self.out / name).unlink(missing_ok=True)
        write_json(self.units / RECIPE, self.recipe.record())
        (self.units / REPLACED).unlink(missing_ok=True)
        return self.recipe

    def is_finished(self, unit: int) -> bool:
        """Whether the pictures of a unit are stored."""
        return self._record(unit).exists()

    def finished(self, unit: int) -> Finished:
        """The record of a unit whose pictures are stored."""
        record = json.loads(self._record(unit).read_bytes())
        return Finished(unit, tuple(record["size"]), record["images"])

    def note(self, unit: Finished, worker: str) -> None:
        """Note that the pictures of a unit are stored."""
        record = {"size": unit.size, "images": unit.images}
        write_json(self._record(unit.number), record, worker)

    def num_finished(self) -> int:
        """How many units are finished, whoever made them."""
        return sum(RECORD_NAME.fullmatch(name) is not None for name in _names(self.units))

    def complete(self, units: Sequence[Finished]) -> None:
        """Write samples.json, and remove the state."""
        images = [image for unit in units for image in unit.images]
        begun = _read(self.units / RECIPE)
        record = begun | {"size": units[0].size, "images": images}
        write_json(self.out / RECORD, record)
        self.forget()

    def forget(self) -> None:
        """Remove the state of the run."""
        shutil.rmtree(self.units, ignore_errors=True)

    def _record(self, unit: int) -> Path:
        return self.units / f"{unit:06d}.json"

    def _is_ours(self, record: Any) -> bool:
        if record is None or fault_of(record):
            return False
        return not self.recipe.difference(Recipe.parse(record, RECORD))

    def _differs(self, record: Any) -> str:
        if fault_of(record):
            return ""
        return f" ({self.recipe.difference(Recipe.parse(record, RECIPE))})"

    def _earlier(self) -> list[str]:
        """The pictures of an earlier, finished run, as its record names them."""
        record = _read(self.out / RECORD) or _read(self.units / REPLACED)
        images = record.get("images") if isinstance(record, dict) else None
        files = [own.get("file") for own in images or () if isinstance(own, dict)]
        # a record may come from anywhere: nothing else is ever removed for it
        return [name for name in files if isinstance(name, str) and OURS.fullmatch(name)]


RECORD_NAME = re.compile(r"\d{6,}\.json")


def _beside(pictures: Sequence[str]) -> Iterator[str]:
    """What a finished run with these files has beside them."""
    yield from (GRID, RECORD) if pictures else ()
    if any(name.endswith(".tar") for name in pictures):
        yield "manifest.json"
        yield from (f"{name}.idx" for name in pictures)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: Path) -> Any:
    """What a file of JSON holds; None if there is none, and text if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        return "damaged"


def require_writable(out: Path) -> None:
    """Make the folder, and see that files can be written to it.

    Raises:
        UserError: they cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"out: cannot write to {out} ({error.strerror}), give another") from error
