"""How fast a run trains, and how much of its time goes into steps or waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Images per second of training and the share of time spent waiting for data.

    `trained`: seconds in all steps that were counted, from when their data was there.
    """

    def __init__(self) -> None:
        self.trained = 0.0
        self._fetched = 0.0
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited, self._images = 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._fetched = time.perf_counter()
        self._waited += self._fetched - start

    def count(self, images: int) -> None:
        """A step with so many images is done."""
        self._images += images
        self.trained += time.perf_counter() - self._fetched

    def take(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        return {
            "images_per_s": self._images / elapsed,
            "data_wait_fraction": self._waited / elapsed,
        }
