"""Signals that ask a run to stop: Ctrl-C, Slurm's warning and its end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from taming_dist.launch import STOP_SIGNALS


class Stopped(BaseException):
    """The run was asked to stop; the message is the signal's name. No `Exception`, so that nobody
    takes it for a fault."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Have the first signal raise `Stopped`, wherever the process is; a second Ctrl-C ends it at
    once. Signals that are ignored, as in the background of a script, stay so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
