"""The watchdog of a rank: a run that makes no progress, or has lost a rank, ends with one line.

The loop tells what it does (`Progress`), and a thread looks how long it has been doing that.
Nothing else ends such a run: a collective waits for half an hour, a reader for ever. On a GPU the
loop is at most one step ahead of the device, whose flags of the step before it reads in each
(`Skips`).
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import taming_dist
from taming_dist.announce import announce, announced
from taming_dist.cli import EXIT_AGAIN
from taming_dist.engine.peers import STOPPED, Peer, Peers, meet
from taming_dist.engine.world import World, is_lost_connection, set_timeout
from taming_dist.errors import LostRank
from taming_dist.processes import children, state_of, this_process
from taming_dist.training.clock import Clock
from taming_dist.training.ending import log_of, logger, tell
from taming_dist.training.signals import StopRequest
from taming_dist.training.waits import PATIENCE_S, Leaving, Waits

Item = TypeVar("Item")

PERIOD_S = 0.5
EARLY = 3  # times as long may pass before the first step is done: it compiles
FIRST_TO_SPEAK_S = 5.0  # for ranks that do not wait for another: theirs is the cause
GRACE_S = 10.0  # for the loop, which learns of a lost rank by itself unless it waits for ever
TELL_S = 1.0  # to have the others know that this rank ends
FIND_S = 25.0  # to find out which rank is lost
LAST_S = 30.0  # to say why, on a disk that may hang
PACKAGE = Path(taming_dist.__file__).parent


class Progress:
    """What the loop of this rank is doing, and since when; to begin something is progress."""

    def __init__(self) -> None:
        self.steps = 0  # done since the start
        self.doing, self.since = "starting", time.monotonic()
        self.waits = Waits()

    def begin(self, doing: str) -> None:
        """Something new begins: "waiting for data", say."""
        self.doing, self.since = doing, time.monotonic()

    def each(self, doing: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, which may have to be waited for; each of them is progress."""
        iterator = iter(items)
        for number in count():
            with self.waiting(f"waiting for data ({doing})", f"{doing} {number}"):
                found = list(islice(iterator, 1))
            if not found:
                return
            self.begin(doing)
            yield found[0]

    @contextmanager
    def waiting(self, doing: str, name: str) -> Iterator[None]:
        """A wait for data begins, of the same `name` on all ranks."""
        self.begin(doing)
        with self.waits.wait(name):
            yield


@contextmanager
def watching(
    run_dir: Path, world: World, clock: Clock, stuck_after: float, stop: StopRequest
) -> Iterator[Progress]:
    """Watch over the loop, which is given its `Progress`, for `stuck_after` seconds without any (0:
    for ever), over its waits once it is asked to stop, and over the other ranks (collective).

    Raises:
        LostRank: for an error of the connection to another rank; it names that rank.
    """
    progress, peers, dog = Progress(), None, None
    with open(log_of(run_dir, world.rank), "a", encoding="utf-8") as log:
        try:
            peers = meet(world)
            dog = Watchdog(progress, peers, run_dir, world, clock, stuck_after, stop, log)
            dog.start()
            with progress.waits.listening():
                yield progress
            world.barrier()  # from here on a rank that ends is none that is lost
        except Exception as error:
            if world.world_size > 1 and is_lost_connection(error):
                raise lost_rank(peers, run_dir) from error
            if peers is not None:
                # those on other hosts would have to wait until this rank is silent
                peers.agree(f"{peers.me} has ended", TELL_S)
            raise
        finally:
            if dog is not None:
                dog.close()


def lost_rank(peers: Peers | None, run_dir: Path) -> LostRank:
    """What an error of the connection to another rank means."""
    line = None if peers is None else peers.lost(FIND_S)
    return LostRank(
        f"{line or 'another rank has ended or does not answer'}: see what the launcher says of it, "
        f"and the logs in {run_dir / 'logs'}"
    )


class Watchdog:
    """The thread that looks, from `start` to `close`."""

    def __init__(
        self,
        progress: Progress,
        peers: Peers | None,
        run_dir: Path,
        world: World,
        clock: Clock,
        stuck_after: float,
        stop: StopRequest,
        log: IO[str],
    ) -> None:
        self._progress, self._peers, self._stuck_after = progress, peers, stuck_after
        self._run_dir, self._world, self._clock, self._log = run_dir, world, clock, log
        self._leaving = Leaving(progress.waits, stop, peers)
        self._me = Peer(world.rank, this_process())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        if self._peers is not None:
            self._peers.start()
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._peers is not None:
            self._peers.close()

    def _watch(self) -> None:
        before, shortened = time.monotonic(), False
        while not self._ended.wait(PERIOD_S):
            if time.monotonic() - before > 10 * PERIOD_S:  # this very process was stopped
                self._progress.since = time.monotonic()
            before = time.monotonic()
            if self._peers is not None and self._peers.verdict is not None:
                self._dump()
                if not self._ended.wait(GRACE_S):
                    self._end(self._peers.verdict)
            elif self._leaving.look(PATIENCE_S * self._early):
                self._end(self._unsaved())
            elif self._stuck_after > 0:
                # by a thread of C: for a loop that keeps this one from running
                faulthandler.dump_traceback_later(2 * self._limit, exit=True, file=self._log)
                if time.monotonic() - self._progress.since > self._limit:
                    self._end(self._agreed())
                if self._progress.steps > 0 and not shortened:
                    set_timeout(2 * self._stuck_after)
                    shortened = True

    @property
    def _limit(self) -> float:
        return self._stuck_after * self._early

    @property
    def _early(self) -> int:
        return 1 if self._progress.steps > 0 else EARLY

    def _agreed(self) -> str:
        """Why nothing goes on, in the words of the rank that is its cause."""
        self._dump()
        place = place_of_loop()
        if self._peers is None:
            return self._stuck(place.words)
        if (suspect := self._peers.suspect()) is not None:
            return self._peers.agree(f"{suspect}: {self._since()}", FIRST_TO_SPEAK_S)
        if place.waits:
            time.sleep(FIRST_TO_SPEAK_S)
        return self._peers.agree(self._stuck(place.words), FIRST_TO_SPEAK_S)

    def _unsaved(self) -> str:
        """Why a run that is asked to stop cannot save, in the words of whoever is first."""
        self._dump()
        line = (
            f"{self._me} was asked to stop at step {self._clock.step + 1}, {self._progress.doing}"
            f"{stopped_child()} ({place_of_loop().words}), which other ranks do not wait for: "
            f"nothing was saved, and the same command resumes from the last checkpoint"
        )
        return line if self._peers is None else self._peers.agree(line, FIRST_TO_SPEAK_S)

    def _stuck(self, place: str) -> str:
        what = f"{self._progress.doing}{stopped_child()} ({place})"
        return f"{self._me} is stuck: {self._since()}, {what}"

    def _since(self) -> str:
        step = self._clock.step + 1
        return f"no progress for {self._limit:.0f} s (train.stuck_after) at step {step}"

    def _dump(self) -> None:
        faulthandler.dump_traceback(file=self._log, all_threads=True)

    def _end(self, line: str) -> None:
        """End this process, whatever its other threads wait for."""
        faulthandler.dump_traceback_later(LAST_S, exit=True, file=self._log)
        for child in stopped_children():  # which would not notice
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        logger.error("%s", line)
        tell(self._run_dir, self._world, self._clock, line)
        if not announced():  # a rank that has ended may have said why
            announce(line, f"; stacks of all threads are in {self._run_dir / 'logs'}")
        os._exit(EXIT_AGAIN)


class Place(NamedTuple):
    """Where the loop is, in words, and whether it waits there for other ranks: in a collective, or
    for the device, which may be in one."""

    words: str
    waits: bool


def place_of_loop() -> Place:
    """Where the main thread is in this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits_for = ""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "/torch/distributed/" in str(file):
            waits_for = "in a collective, "
        elif file == PACKAGE / "copies.py":
            waits_for = "for the device, "
        elif file.is_relative_to(PACKAGE):
            words = f"{file.relative_to(PACKAGE.parent)}:{frame.f_lineno}"
            return Place(f"{waits_for}{words}, {frame.f_code.co_name}", waits_for != "")
        frame = frame.f_back
    return Place(f"{waits_for}outside of taming_dist", waits_for != "")


def stopped_child() -> str:
    """The processes that this one has started and that are stopped, in words."""
    stopped = " and ".join(str(child) for child in stopped_children())
    return f", where its process {stopped} is stopped" if stopped else ""


def stopped_children() -> list[int]:
    """The processes that this one has started and that are stopped."""
    return [process for process in children() if state_of(process) == STOPPED]
