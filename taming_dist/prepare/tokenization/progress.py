"""A worker's progress line: images done, speed, time left, and time spent waiting for data."""

import time

from taming_dist.cli import duration

REPORT_EVERY_S = 10.0


class Progress:
    """Progress, printed every few seconds; `who` names the worker, `total` is of all workers."""

    def __init__(self, who: str, total: int) -> None:
        self._who, self._total = who, total
        self._here = self._elsewhere = 0
        self._found: int | None = None
        self._waited = 0.0
        self._started = self._said = time.monotonic()

    def finished(self, images: int) -> None:
        """Note that so many images lie in finished shards, whoever made them."""
        if self._found is None:
            self._found = images
        self._elsewhere = max(0, images - self._found - self._here)

    def advance(self, count: int) -> None:
        """Note that this worker has encoded `count` more images."""
        self._here += count
        if time.monotonic() - self._said > REPORT_EVERY_S:
            self.report()

    def waited(self, seconds: float) -> None:
        """Note that this worker has waited for images."""
        self._waited += seconds

    def report(self) -> None:
        """Print the line."""
        self._said = time.monotonic()
        elapsed = max(self._said - self._started, 1e-9)
        done = min(self._total, (self._found or 0) + self._here + self._elsewhere)
        speed = (self._here + self._elsewhere) / elapsed
        left = (self._total - done) / speed if speed else 0.0
        print(
            f"{self._who}{done} of {self._total} images, {self._here / elapsed:.1f} images/s here, "
            f"{self._waited / elapsed:.0%} of the time waiting for data, {duration(left)} left",
            flush=True,
        )
