"""Where a run tells what it does: metrics.jsonl, events.jsonl, the console, previews, W&B.

Rank 0 alone writes. metrics.jsonl is the truth; W&B gets the same numbers (`wandb_sink`).
"""

import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.formats.png import save_png
from taming_dist.formats.strict_json import json_lines, json_safe
from taming_dist.training.artifacts import Describe
from taming_dist.training.clock import Clock
from taming_dist.training.console import Console
from taming_dist.training.recipe import Measured, Preview
from taming_dist.training.wandb_sink import LogConfig, WandB, wandb_mode

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One place that metrics go to."""

    def log(self, clock: Clock, record: Measured) -> None: ...
    def image(self, clock: Clock, path: Path, caption: str) -> None: ...
    def event(self, name: str, clock: Clock, details: dict[str, Any]) -> None: ...
    def artifact(self, describe: Describe, made: bool) -> None: ...
    def note(self, text: str) -> None: ...
    def rewind(self, clock: Clock) -> None: ...
    def close(self, failed: bool) -> None: ...


class Sinks:
    """All sinks of a run; with no run directory (every rank but the first) it is silent."""

    def __init__(self, run_dir: Path | None, sinks: list[Sink]) -> None:
        self.run_dir = run_dir
        self._sinks = sinks
        self._failing: set[str] = set()  # what the disk has not taken the last time

    def log(self, clock: Clock, record: Measured) -> None:
        """Numbers by name, such as train/rec, at the present step; curves go to the file only."""
        for sink in self._sinks:
            self._write(type(sink).__name__, partial(sink.log, clock, record))

    def _write(self, what: str, write: Callable[[], None]) -> None:
        """Write something that a run can do without: if the disk does not take it, say so once, and
        go on. A checkpoint that is not taken is a failure of its own."""
        try:
            write()
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            why = cause.strerror if isinstance(cause, OSError) else cause
            if not self._failing:
                self.note(
                    f"{self.run_dir} does not take all that is logged ({why}); the run goes on"
                )
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def logged(self, clock: Clock, group: str) -> Measured | None:
        """What metrics.jsonl has of a group, such as val, of the present moment, by names without
        it; None where it has nothing, and on every rank but the first."""
        return None if self.run_dir is None else MetricsFile(self.run_dir).find(clock, group)

    def image(self, clock: Clock, preview: Preview | None) -> None:
        """A preview: images/images-000000012000.png, by images seen."""
        if self.run_dir is None or preview is None:
            return
        path = self.run_dir / "images" / f"images-{clock.images:012d}.png"
        self._write("images", partial(save_png, preview.picture, path, preview.caption))
        if path.is_file():
            for sink in self._sinks:
                sink.image(clock, path, preview.caption)

    def event(self, name: str, clock: Clock, **details: Any) -> None:
        """A line of events.jsonl: start, resume, save, save_failed, best, signal, skip, collapse,
        error, exit."""
        if self.run_dir is None:
            return
        line = {"event": name, "step": clock.step, "samples": clock.images, "time": time.time()}
        self._write("events", partial(append_line, self.run_dir / "events.jsonl", line | details))
        for sink in self._sinks:
            sink.event(name, clock, details)

    def artifact(self, describe: Describe, made: bool) -> None:
        """Something that the run has read, or `made`, for its lineage."""
        for sink in self._sinks:
            sink.artifact(describe, made)

    def note(self, text: str) -> None:
        """A line for the person at the terminal."""
        for sink in self._sinks:
            sink.note(text)

    def rewind(self, clock: Clock) -> None:
        """The run resumes from an earlier moment: what was logged after it did not happen."""
        for sink in self._sinks:
            sink.rewind(clock)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for sink in self._sinks:
            sink.close(failed=error is not None)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object on a line of its own, also after one that a crash has torn.

    The folder is made where it is missing. A number that is not finite is left out: JSON has none.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(json_safe(values), allow_nan=False).encode() + b"\n")


class MetricsFile:
    """metrics.jsonl: one object per log point or validation, with step, samples and time."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"

    def log(self, clock: Clock, record: Measured) -> None:
        stamp = {"step": clock.step, "samples": clock.images, "time": time.time()}
        append_line(self.path, {**stamp, **record})

    def event(self, name: str, clock: Clock, details: dict[str, Any]) -> None:
        pass

    def image(self, clock: Clock, path: Path, caption: str) -> None:
        pass

    def artifact(self, describe: Describe, made: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def rewind(self, clock: Clock) -> None:
        """Cut what was logged after the images seen, and a line that was torn by a crash."""
        if not self.path.is_file():
            return
        read = list(json_lines(self.path))
        damaged = [number for number, (_, values) in enumerate(read, 1) if values is None]
        for number in damaged:
            if number < len(read):  # the last one may be torn by any crash
                logger.warning("%s: line %d is damaged and was left out", self.path, number)
        kept = [line for line, values in read if values and values["samples"] <= clock.images]
        with writing(self.path.parent):
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def find(self, clock: Clock, group: str) -> Measured | None:
        """The metrics of a group, such as val, of the present moment, by names without it; None
        where there are none."""
        if not self.path.is_file():
            return None
        read = (values for _, values in json_lines(self.path) if values)
        here = (values for values in read if values["samples"] == clock.images)
        found: dict[str, Any] = {
            name.partition("/")[2]: value
            for values in here
            for name, value in values.items()
            if name.startswith(f"{group}/")
        }
        return found or None

    def close(self, failed: bool) -> None:
        pass


def open_sinks(
    config: LogConfig, run_dir: Path, name: str, clock: Clock, values: dict[str, Any]
) -> Sinks:
    """The sinks of the first rank."""
    sinks: list[Sink] = [MetricsFile(run_dir), Console(clock, name)]
    if wandb_mode(config) != "disabled":
        sinks.append(WandB(config, run_dir, name, values))
    return Sinks(run_dir, sinks)
