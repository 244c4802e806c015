"""How fast a run trains, and how much of its time it waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Images per second of training and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited, self._images = 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, images: int) -> None:
        self._images += images

    def take(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        return {
            "images_per_s": self._images / elapsed,
            "data_wait_fraction": self._waited / elapsed,
        }
