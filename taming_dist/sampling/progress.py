"""How much of a run is done, how fast, and how long the rest will take."""

import sys
import time
from collections.abc import Callable

from taming_dist.cli import duration

PERIOD_S = 10.0
TERMINAL_PERIOD_S = 0.2


class Progress:
    """Progress of `total` images on stderr, or of what else `noun` says, said now and then by one
    of the workers.

    `count`: tells how many are finished, whoever made them; it is asked only when a line is due,
    because it looks at the disk. So is `note`, which ends the line, unless all are done.
    """

    def __init__(
        self,
        total: int,
        count: Callable[[], int],
        silent: bool = False,
        noun: str = "images",
        note: Callable[[], str] | None = None,
    ) -> None:
        self.total, self._count, self._silent = total, count, silent
        self._noun, self._note = noun, note
        self._terminal = sys.stderr.isatty()
        self._period = TERMINAL_PERIOD_S if self._terminal else PERIOD_S
        self._start = self._said = time.perf_counter()
        self._found = 0 if silent else count()

    def look(self, unfinished: float = 0.0) -> None:
        """Say a line if one is due. `unfinished`: images that this worker has made of a unit which
        is not finished; parts of one count."""
        if time.perf_counter() - self._said >= self._period and not self._silent:
            self._say(self._count() + unfinished)

    def end(self) -> None:
        """Say that all are done."""
        if not self._silent:
            self._say(self.total)

    def _say(self, done: float) -> None:
        self._said = time.perf_counter()
        speed = (done - self._found) / (self._said - self._start)
        # an image may take hours: a hundredth of one counts where there are few
        shown = int(done) if self.total >= 100 else int(done * 100) / 100
        rate = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        line = f"{shown:g}/{self.total} {self._noun}, {rate} {self._noun}/s"
        if speed > 0 and done < self.total:
            line += f", {duration((self.total - done) / speed)} left"
        if self._note is not None and done < self.total:
            line += f", {self._note()}"
        end = "\r" if self._terminal and done < self.total else "\n"
        print(line, end=end, file=sys.stderr, flush=True)
