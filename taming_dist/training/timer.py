"""How fast a run trains, how much of its time goes into waits for data, and how much is left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from taming_dist.training.clock import Clock
from taming_dist.training.workload import Speed


class Timer:
    """Images per second of training, the share of time spent waiting for data, and with a `speed`
    that of the devices' peak which training has come to.

    `trained`: seconds in all steps that were counted, from when their data was there.
    """

    def __init__(self, speed: Speed | None = None) -> None:
        self.trained = 0.0
        self._speed = speed
        self._fetched = 0.0
        self._first: tuple[float, int] | None = None  # when a log point was, and images seen then
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited, self._images, self._flops = 0.0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._fetched = time.perf_counter()
        self._waited += self._fetched - start

    def count(self, clock: Clock) -> None:
        """A step is done, which the clock has counted."""
        self._images += clock.global_batch
        if self._speed is not None:
            self._flops += clock.global_batch * self._speed.workload.flops(clock.step - 1)
        self.trained += time.perf_counter() - self._fetched

    @property
    def waited(self) -> float:
        """The share of the time since `restart` that went into waits for data."""
        return self._waited / (time.perf_counter() - self._start)

    def take(self, clock: Clock) -> dict[str, float]:
        """What a log point says of the time since `restart`; `time_left_s` goes by all that was
        since the first log point of this start, with what it has validated and saved."""
        now = time.perf_counter()
        elapsed = now - self._start
        found = {
            "images_per_s": self._images / elapsed,
            "data_wait_fraction": self._waited / elapsed,
            "time_left_s": self._left(clock, now),
        }
        if self._speed is not None:
            found["mfu"] = self._speed.utilization(self._flops, elapsed)
        return found

    def _left(self, clock: Clock, now: float) -> float:
        since, images = self._first or (self._start, clock.images - self._images)
        if self._first is None:
            self._first = (now, clock.images)
        seen = clock.images - images
        return (clock.total_images - clock.images) * (now - since) / seen if seen else 0.0
