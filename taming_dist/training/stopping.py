"""Whether a run is to stop: the same answer on all ranks at the same moment."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from taming_dist.engine.world import Agreement, World
from taming_dist.training.signals import StopRequest

Item = TypeVar("Item")


class Interrupted(Exception):
    """The ranks have agreed to stop in the middle of something that the next start can repeat."""


class Stopping:
    """What the ranks have agreed on after a signal to one of them.

    `agreed`: to stop; `interrupted`: something was left unfinished for it.
    """

    def __init__(self, request: StopRequest, world: World) -> None:
        self._request, self._asked = request, Agreement(world)
        self.agreed = self.interrupted = False

    def __call__(self) -> bool:
        """Look whether to stop (collective); it stays so."""
        self.agreed = self._asked(self._request.asked) or self.agreed
        return self.agreed

    def leave(self) -> None:
        """Stop because all ranks have left a wait for data (see `training/waits.py`), with threads
        that may wait for ever."""
        self.agreed = self.interrupted = self._request.abandons = True

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, as many on every rank (collective); `Interrupted` before the next one once
        ranks agree to stop."""
        for item in items:
            if self():
                self.interrupted = True
                raise Interrupted
            yield item
