"""Signals that ask a run to save and stop: Ctrl-C, Slurm's warning (USR1) and its end (TERM), the
end of the terminal (HUP).

Installed before torch is imported (that takes seconds, in which the default action would kill the
rank), so nothing heavy is imported here.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from taming_dist.launch import STOP_SIGNALS, by_srun, by_torchrun

TOGETHER_S = 3.0  # signals within this time are one: launchers pass on what the rank has got, too


def outlast_the_launcher() -> None:
    """Have SIGTERM change nothing any more, for a rank that is about to end with its own status.

    Launchers end all ranks as soon as one has failed, and a rank takes a second or two to end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python would give up a handler while it ends


class StopRequest:
    """Remembers the first signal; a second Ctrl-C or SIGTERM ends the process at once, whatever it
    waits for (see `Repeated`)."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.abandons = False  # threads that still wait for data: the process ends without them
        self.last_words: Callable[[str], None] | None = None  # for a process that ends at once
        self._parent = os.getppid()

    def install(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            # nohup has this one ignored, and means it; slurm/rank.sh has others, for itself
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        return self

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let signals but Slurm's warning end the process as they do by themselves: while ranks
        wait to meet there is nothing to save, and a rank that waits in vain for one that failed
        must end."""
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGUSR1]
        kept = {number: signal.getsignal(number) for number in numbers}
        for number, handler in kept.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self.name is not None

    @property
    def is_orphan(self) -> bool:
        """Whether the torchrun that has started this rank is gone: that asks it to stop, too."""
        return by_torchrun() and os.getppid() != self._parent

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def _watch(self, reader: int) -> None:
        """Look at each signal as it comes. A handler in Python would run only once the main thread
        is back in Python, and that may be waiting for a rank that is gone."""
        repeated = Repeated()
        while received := os.read(reader, 1):
            number = received[0]
            if repeated(number, time.monotonic()):
                if self.last_words is not None:
                    self.last_words(f"a second {signal.Signals(number).name}")
                os._exit(128 + number)


class Repeated:
    """Whether a signal asks to end at once: Ctrl-C a second time, or SIGTERM.

    torchrun passes Ctrl-C on to ranks that the terminal has sent it already, and a container's
    first process may do so with SIGTERM: what comes within `TOGETHER_S` of the first counts as one.
    Slurm repeats SIGTERM itself shortly before it kills, so there it hurries nobody.
    """

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._together_s = {
            signal.SIGINT: TOGETHER_S if by_torchrun() or by_srun() else 0.0,
            signal.SIGTERM: float("inf") if by_srun() else TOGETHER_S,
        }

    def __call__(self, number: int, now: float) -> bool:
        """Take in a signal that has come at a time of the monotonic clock, in seconds."""
        if number not in self._together_s:
            return False
        if number not in self._first:
            self._first[number] = now
            return False
        return now - self._first[number] >= self._together_s[signal.Signals(number)]
