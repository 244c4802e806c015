"""Work on the models: one piece at a time, which tells how it is getting on and can be stopped."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

Told = TypeVar("Told")


class Halted(Exception):
    """The user has stopped the work."""


class Job(Generic[Told]):
    """A piece of work as it sees itself: whom it tells, and whether it is to go on."""

    def __init__(self, tell: Callable[[Told], None], stop: threading.Event) -> None:
        self.tell, self._stop = tell, stop

    def go_on(self) -> None:
        """Raise `Halted` if it has been stopped. To be called as often as is convenient."""
        if self._stop.is_set():
            raise Halted


class Jobs:
    """A thread in which pieces of work are done one after the other; a user, by the name of the
    session, has one of them at a time."""

    def __init__(self) -> None:
        # One thread for all: torch shares sums out among as many threads for each piece of work.
        self._pool = ThreadPoolExecutor(1, "job")
        self._stops: dict[str, threading.Event] = {}

    def run(self, session: str, work: Callable[[Job[Told]], None]) -> Iterator[Told]:
        """Do it, and yield what it tells; its exceptions come out here. Whoever listens no longer
        has stopped it."""
        self.stop(session)
        stop = self._stops[session] = threading.Event()
        told: SimpleQueue[tuple[Told, ...]] = SimpleQueue()

        def done(_: Future) -> None:
            told.put(())

        job: Job[Told] = Job(lambda news: told.put((news,)), stop)
        future = self._pool.submit(self._work, work, job)
        future.add_done_callback(done)
        try:
            while news := told.get():
                yield news[0]
            future.result()
        finally:
            stop.set()
            if self._stops.get(session) is stop:
                del self._stops[session]

    def stop(self, session: str) -> None:
        """Stop what a user has at work, at its next step."""
        if session in self._stops:
            self._stops[session].set()

    def close(self) -> None:
        """Stop everything, and wait for it."""
        for stop in list(self._stops.values()):
            stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _work(work: Callable[[Job[Told]], None], job: Job[Told]) -> None:
        job.go_on()
        work(job)
