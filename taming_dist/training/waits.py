"""Waits for data, which a run that is asked to stop leaves: a batch comes from a process, a disk or
a store that may hang.

A rank that waits for a batch has done the same steps as all that wait for the same one, so that
together they can save these. Each that is asked to stop, or sees that another one leaves, leaves
the wait once it has lasted for a while: from then on it takes no batch any more. When all ranks
have left, their loops go on with `Interrupted`. If one of them has its batch and is in the step, it
waits there for the others in vain, and nothing can be saved: the run ends with a line.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from taming_dist.engine.peers import Peers
from taming_dist.training.signals import StopRequest
from taming_dist.training.stopping import Interrupted

PATIENCE_S = 10.0  # with a wait, once asked to stop
TOGETHER_S = 20.0  # for the other ranks to leave theirs
WAKE = signal.SIGURG  # interrupts what the main thread waits in; nobody else's, and harmless


class Waits:
    """The waits of the main thread, one after the other, as a thread beside it sees them.

    `name` of the present one, the same on all ranks; None where there is none. `left`: it is left,
    and no batch is taken any more.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.since = time.monotonic()
        self.left = False
        self._over = threading.Lock()  # to leave a wait, or for it to end: one of them comes first

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Wait for data inside.

        Raises:
            Interrupted: all ranks have left this wait.
        """
        self.since, self.name = time.monotonic(), name
        yield
        with self._over:
            if not self.left:
                self.name = None
        while self.left:  # others count on it
            time.sleep(1)

    def leave(self, name: str) -> None:
        """Leave the present wait, unless it has just ended."""
        with self._over:
            self.left = self.name == name

    def end(self) -> None:
        """Have the main thread go on."""
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have `end` reach the main thread, which enters this."""
        before = signal.signal(WAKE, self._woken)
        try:
            yield
        finally:
            signal.signal(WAKE, before)

    def _woken(self, number: int, frame: FrameType | None) -> None:
        if self.left:
            self.left, self.name = False, None
            raise Interrupted


class Leaving:
    """Leaves waits together with the other ranks."""

    def __init__(self, waits: Waits, request: StopRequest, peers: Peers | None) -> None:
        self._waits, self._request, self._peers = waits, request, peers
        self._since = 0.0

    def look(self, patience_s: float) -> bool:
        """Look whether to leave the present wait, if it lasts for so long; gives whether that has
        failed, because some rank does not wait as this one does."""
        waits, peers = self._waits, self._peers
        name = waits.name
        if name is None or time.monotonic() - waits.since < patience_s:
            return False
        others = 0 if peers is None else peers.leaving(name)
        if not waits.left and (self._request.asked or others > 0):
            waits.leave(name)
            self._since = time.monotonic()
            if waits.left and peers is not None:
                peers.leave(name)
        if not waits.left:
            return False
        if peers is None or others == peers.count:
            waits.end()
        return time.monotonic() - self._since > TOGETHER_S
