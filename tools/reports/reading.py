"""What a run directory holds, read as far as it goes: a run may be young, torn or damaged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from taming_dist.cli import count
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import json_lines
from taming_dist.training.recipe import CODE_COUNTS

Row = dict[str, Any]
FILES = ("metrics.jsonl", "events.jsonl", "config.yaml")
RUNNING = "throughput/running_s"
UTILIZATION = "throughput/mfu"
COUNTED = f"val/{CODE_COUNTS}"


@dataclass(frozen=True)
class Timeline:
    """Where a run was after so many images: points [n] of images, optimizer steps, and hours."""

    images: np.ndarray
    steps: np.ndarray
    hours: np.ndarray

    def at(self, images: Sequence[float]) -> dict[str, list[float]]:
        """The same moments on each axis, by its name."""
        steps = np.interp(images, self.images, self.steps)
        hours = np.interp(images, self.images, self.hours)
        return {"images": list(images), "steps": steps.tolist(), "hours": hours.tolist()}


@dataclass(frozen=True)
class Picture:
    """A preview: its file, after how many images it was drawn, and what its rows show."""

    file: Path
    images: int
    rows: str
    width: int


@dataclass(frozen=True)
class CodeUses:
    """How often a validation, after so many images, used each code: counts [codes], falling."""

    images: float
    counts: np.ndarray

    @property
    def top(self) -> float:
        """The share of the uses that went to the most used 1 % of the codes, at least one code."""
        most = max(1, round(self.counts.size / 100))
        return float(self.counts[:most].sum() / self.counts.sum())


@dataclass(frozen=True)
class RunRecord:
    """A run: `rows` of metrics.jsonl, `events`, its `config` by dotted keys, previews and uses of
    the codes in order, and in `faults` what could not be read. `number` counts the runs of a page
    from 1."""

    number: int
    name: str
    folder: Path
    rows: list[Row]
    events: list[Row]
    config: dict[str, Any]
    previews: list[Picture]
    uses: list[CodeUses]
    faults: list[str]

    @cached_property
    def peak_is_wrong(self) -> bool:
        """Whether training came to more than the devices' peak at some log point: the peak was then
        measured on a busy machine, and no share of it is known."""
        return any((number(row.get(UTILIZATION)) or 0.0) > 1 for row in self.rows)

    @cached_property
    def timeline(self) -> Timeline:
        """Steps are those that were made, whatever the global batch was when they were. Hours are
        those that processes ran, over all starts; of older runs, those that have passed."""
        rows = sorted(self.rows, key=lambda row: row["samples"])
        images, steps = [0.0], [0.0]
        for row in rows:
            seen, step = row["samples"], number(row.get("step")) or 0
            if seen <= images[-1]:
                continue
            batch = seen / step if step > 0 else 1.0
            steps.append(steps[-1] + (seen - images[-1]) / batch)
            images.append(seen)
        clocked = [row for row in rows if number(row.get(RUNNING)) is not None]
        if clocked:
            hours = [row[RUNNING] / 3600 for row in clocked]
        else:
            clocked = [row for row in rows if number(row.get("time")) is not None]
            began = min(
                (row["time"] for row in (*clocked, *self.events) if "time" in row), default=0
            )
            hours = [(row["time"] - began) / 3600 for row in clocked]
        at = [0.0, *(row["samples"] for row in clocked)]
        return Timeline(np.array(images), np.array(steps), np.interp(images, at, [0.0, *hours]))


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in their order, under names that tell them apart.

    Raises:
        UserError: a folder holds no run.
    """
    return [
        read_run(folder, name, place)
        for place, (folder, name) in enumerate(zip(folders, names(folders), strict=True), 1)
    ]


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(part[-depth:]) for part in parts]
        if len(set(found)) == len(set(parts)):
            return found
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str, place: int = 1) -> RunRecord:
    """One run; see `read_runs`."""
    if not any((folder / file).is_file() for file in FILES):
        raise UserError(f"{folder} is no run ({', '.join(FILES)} are missing): give a run.dir")
    faults: list[str] = []
    rows, events = (read_lines(folder / file, faults) for file in FILES[:2])
    config, previews = read_config(folder / FILES[2], faults), read_previews(folder, faults)
    uses = read_uses(rows, faults)
    return RunRecord(place, name, folder, rows, events, config, previews, uses, faults)


def read_lines(file: Path, faults: list[str]) -> list[Row]:
    """The objects in a file that has one on each line, without lines that are torn or damaged."""
    try:
        read = [values for _, values in json_lines(file)]
    except OSError as error:
        faults.append(f"{file.name} cannot be read ({error.strerror})")
        return []
    whole = [values for values in read if values is not None]
    if len(whole) < len(read):
        faults.append(f"{count(len(read) - len(whole), 'line')} of {file.name} cannot be read")
    return whole


def read_config(file: Path, faults: list[str]) -> dict[str, Any]:
    """config.yaml by dotted keys; empty if there is none that can be read."""
    try:
        found = yaml.safe_load(file.read_bytes())
    except OSError as error:
        faults.append(f"{file.name} cannot be read ({error.strerror})")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        faults.append(f"{file.name} is damaged")
        return {}
    return dict(flat(found))


def flat(values: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values by dotted keys; a list is one value."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, dict) and value
        found += flat(value, f"{name}.") if is_group else [(name, value)]
    return found


def read_previews(folder: Path, faults: list[str]) -> list[Picture]:
    """The previews of a run, by images seen."""
    found, damaged = [], 0
    for file in sorted((folder / "images").glob("images-*.png")):
        try:
            seen = int(file.stem.removeprefix("images-"))
            with Image.open(file) as image:
                image.load()
                rows, width = image.info.get("Description", ""), image.width
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            damaged += 1
            continue
        found.append(Picture(file, seen, str(rows), width))
    if damaged:
        faults.append(f"{count(damaged, 'preview')} cannot be read")
    return found


def read_uses(rows: Sequence[Row], faults: list[str]) -> list[CodeUses]:
    """The first and the last counts of the codes that validations logged, by images seen."""
    logged = [(row["samples"], row[COUNTED]) for row in rows if COUNTED in row]
    whole = sorted((each for each in logged if are_counts(each[1])), key=lambda each: each[0])
    if len(whole) < len(logged):
        faults.append(f"{count(len(logged) - len(whole), 'list')} of {COUNTED} cannot be read")
    shown = whole if len(whole) < 2 else [whole[0], whole[-1]]
    return [CodeUses(seen, np.sort(np.array(counts))[::-1]) for seen, counts in shown]


def are_counts(value: Any) -> bool:
    """Whether these are whole numbers of uses, with at least one use."""
    if not isinstance(value, list):
        return False
    return all(type(each) is int and 0 <= each < 2**40 for each in value) and any(value)


def number(value: Any) -> float | None:
    """A finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 and math.isfinite(value) else None
