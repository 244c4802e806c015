"""How many images of a run are done, how fast, and how long the rest will take."""

import sys
import time

PERIOD_S = 10.0
TERMINAL_PERIOD_S = 0.2


class Progress:
    """Progress of `total` images on stderr, said now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0.0
        self._terminal = sys.stderr.isatty()
        self._period = TERMINAL_PERIOD_S if self._terminal else PERIOD_S
        self._start = self._said = time.perf_counter()

    def at(self, done: float) -> None:
        """Note that so many images are done; parts of one count."""
        self.done = done
        now = time.perf_counter()
        if now - self._said >= self._period or done >= self.total:
            self._said = now
            end = "\r" if self._terminal and done < self.total else "\n"
            print(self._line(now - self._start), end=end, file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        speed = self.done / elapsed
        left = f", {duration((self.total - self.done) / speed)} left" if speed else ""
        return f"{int(self.done)}/{self.total} images, {speed:.2f} images/s{left}"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
