"""Signals that ask a run to save and stop: Ctrl-C, Slurm's warning (USR1) and its end (TERM).

Installed before torch is imported (that takes seconds, in which the default action would kill the
rank), so nothing heavy is imported here.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from taming_dist.launch import STOP_SIGNALS


def outlast_the_launcher() -> None:
    """Have SIGTERM change nothing any more, for a rank that is about to end with its own status.

    Launchers end all ranks as soon as one has failed, and a rank takes a second or two to end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python would give up a handler while it ends


class StopRequest:
    """Remembers the first signal; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        return self

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the process as they do by themselves: while ranks wait to meet
        there is nothing to save, and a rank that waits in vain for one that failed must end."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        kept = [signal.signal(number, signal.SIG_DFL) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, kept, strict=True):
                signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self.name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            sys.exit(128 + number)
        self.name = self.name or signal.Signals(number).name
