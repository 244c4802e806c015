"""The person at the terminal, who may leave: `train | head -1`, a lost ssh, a full disk behind
stdout. It is said once, in the log of the first rank, and training goes on."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from taming_dist.cli import duration
from taming_dist.training.artifacts import Describe
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Measured, numbers

ORDER = {"train": 0, "val": 1, "ranks": 2, "throughput": 3}  # of the groups in a line
LEFT = "throughput/time_left_s"

logger = logging.getLogger(__name__)


class Terminal(RichConsole):
    """A terminal that raises what happens: rich would end the process where a pipe is closed."""

    def on_broken_pipe(self) -> None:
        raise


def left(seconds: float | None) -> str:
    """The time that is left of a run, behind its step: ", 2 h 05 min left"."""
    return "" if seconds is None else f", {duration(seconds)} left"


class Console:
    """A line per log point; in a terminal with a progress bar below it."""

    def __init__(self, clock: Clock, name: str) -> None:
        plain = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        self._terminal = Terminal(file=sys.stdout, **plain)  # type: ignore[arg-type]
        self._bar: Progress | None = None
        if self._terminal.is_terminal:
            self._bar = Progress(
                TextColumn(name, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._terminal,
                transient=True,
            )
            self._task = self._bar.add_task(name, total=clock.total_steps)
            self._guard(self._bar.start)

    def log(self, clock: Clock, record: Measured) -> None:
        values = numbers(record)
        remaining = values.pop(LEFT, None)
        names = sorted(values, key=lambda name: (ORDER.get(name.split("/")[0], 0), name))
        text = "  ".join(f"{name} {values[name]:.6g}" for name in names)
        self.note(f"step {clock.step}/{clock.total_steps}{left(remaining)}  {text}")
        if self._bar is not None:
            self._bar.update(self._task, completed=clock.step)

    def event(self, name: str, clock: Clock, details: dict[str, Any]) -> None:
        pass

    def image(self, clock: Clock, path: Path, caption: str) -> None:
        pass

    def artifact(self, describe: Describe, made: bool) -> None:
        pass

    def note(self, text: str) -> None:
        def say() -> None:
            self._terminal.print(text)
            self._terminal.file.flush()

        self._guard(say)

    def rewind(self, clock: Clock) -> None:
        if clock.step:
            self.note(f"resumed at step {clock.step} of {clock.total_steps}")

    def close(self, failed: bool) -> None:
        if self._bar is not None:
            self._guard(self._bar.stop)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            # What is left in buffers has a place to go to, and so has all that follows.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            logger.warning(
                "stdout cannot be written any more (%s): training goes on; metrics.jsonl has what "
                "it would say",
                error.strerror,
            )
