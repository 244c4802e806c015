"""The processes of a run, and which of them has ended, is stopped or is silent.

A collective tells none of it: over NCCL, and on a node that has crashed, it waits. So a thread of
every rank looks, about once a second, whether the processes beside it on its host still exist. The
first rank of each host also counts up a number of its own in the store at which the ranks have met,
and looks whether those of the other hosts go up. Who finds a rank lost leaves a line in the store
that all ranks read: they end with the same words, which name the rank and its host.
"""

import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from taming_dist.engine.world import World
from taming_dist.processes import Process, this_process

PERIOD_S = 1.0
SILENT_S = 60.0  # a host whose number stands for so long is lost, with all ranks on it,
SUSPECT_S = 10.0  # or for so long, once a connection has broken
ANSWER_S = 30.0  # the longest that the store takes for an answer
GONE, STOPPED = "", "T"


@dataclass(frozen=True)
class Peer:
    """The process of a rank."""

    rank: int
    process: Process

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid} on {self.host})"

    @property
    def host(self) -> str:
        return self.process.host

    @property
    def state(self) -> str:
        """See `Process.state`."""
        return self.process.state


class Peers:
    """The other ranks, as a thread of this one sees them from `start` to `close`.

    `verdict`: the line in the store on the rank that is lost, None as long as all is well.
    """

    def __init__(self, everyone: list[Peer], rank: int) -> None:
        self.me, self.count = everyone[rank], len(everyone)
        self._first = everyone[0]
        # those of another container have the same host but are not seen from here
        here = [peer for peer in everyone if peer.host == self.me.host]
        self._near = [peer for peer in here if peer != self.me and peer.state != GONE]
        leaders = {peer.host: peer for peer in reversed(everyone)}
        self._leads = leaders[self.me.host] == self.me
        self._far = [peer for host, peer in leaders.items() if host != self.me.host]
        self.verdict: str | None = None
        self._proposed: str | None = None
        self._suspects = False
        self._answered = time.monotonic()
        self._asked: str | None = None  # what `leaving` is asked of, and the answer
        self._leavers = 0
        self._leaves, self._counted = "", ""  # the wait that this rank leaves, and last was counted
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look; at the address at which the ranks have met."""
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * PERIOD_S)  # it may hang in a store that is stopped

    def suspect(self) -> str | None:
        """Who keeps the others waiting, in words: a rank on this host that was stopped, by SIGSTOP
        or a debugger; or the first rank, which keeps the store, if that does not answer."""
        stopped = next((peer for peer in self._near if peer.state == STOPPED), None)
        if stopped is not None:
            return f"{stopped} is stopped"
        silent = time.monotonic() - self._answered > ANSWER_S
        return f"{self._first} does not answer" if silent and self.me != self._first else None

    def leaving(self, wait: str) -> int:
        """How many ranks have left a wait of theirs of this name, as far as is known by now."""
        if self._asked != wait:
            self._asked, self._leavers = wait, 0
        return self._leavers

    def leave(self, wait: str) -> None:
        """Tell the others that this rank has left a wait."""
        self._asked = self._leaves = wait
        self._changed.set()

    def agree(self, line: str, within_s: float) -> str:
        """Propose why the run ends; gives the words of whoever was first, or one's own where the
        store does not answer in time."""
        self._proposed = line
        self._changed.set()
        return self._wait(within_s) or line

    def lost(self, within_s: float) -> str | None:
        """Once a connection has broken: which rank is lost, None where that does not show in
        time."""
        self._suspects = True
        self._changed.set()
        return self._wait(within_s)

    def _wait(self, within_s: float) -> str | None:
        deadline = time.monotonic() + within_s
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.verdict

    def _watch(self) -> None:
        try:
            self._look(self._connect())
        except (dist.DistError, RuntimeError):  # the store is gone, and with it who kept it
            if not self._ended.is_set():
                self.verdict = self._verdict() or f"{self._first} has ended, or its host"

    def _connect(self) -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(
            address, port, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S)
        )
        first = self._first  # the launcher may keep the store for a restart of all ranks
        return dist.PrefixStore(
            f"peers/{first.host}/{first.process.pid}/{first.process.birth}", store
        )

    def _look(self, store: dist.Store) -> None:
        beat = 0
        heard = {peer: (b"", time.monotonic()) for peer in self._far}
        while not self._ended.is_set():
            before = time.monotonic()
            self._changed.wait(PERIOD_S)
            self._changed.clear()
            if time.monotonic() - before > 5 * PERIOD_S:  # this very process was stopped for long
                heard = {peer: (number, time.monotonic()) for peer, (number, _) in heard.items()}
            if self._leads:
                beat += 1
                store.set(f"beat/{self.me.host}", str(beat))
                for peer, (number, _) in heard.items():
                    found = self._heard(store, peer)
                    if found != number:
                        heard[peer] = (found, time.monotonic())
            self._count_leavers(store)
            line = self._verdict() or self._silent(heard) or self._proposed
            if line is not None:
                # the first one stays
                self.verdict = store.compare_set("verdict", "", line).decode()
            elif store.check(["verdict"]):
                self.verdict = store.get("verdict").decode()
            self._answered = time.monotonic()

    def _count_leavers(self, store: dist.Store) -> None:
        wait = self._asked
        if wait is None:
            return
        is_new = wait == self._leaves != self._counted
        found = store.add(f"left/{wait}", int(is_new))
        if is_new:
            self._counted = wait
        if self._asked == wait:
            self._leavers = found

    @staticmethod
    def _heard(store: dist.Store, peer: Peer) -> bytes:
        key = f"beat/{peer.host}"
        return store.get(key) if store.check([key]) else b""

    def _verdict(self) -> str | None:
        """A rank on this host that has ended, in words."""
        ended = next((peer for peer in self._near if peer.state == GONE), None)
        return None if ended is None else f"{ended} has ended"

    def _silent(self, heard: dict[Peer, tuple[bytes, float]]) -> str | None:
        """A host that does not answer, in words."""
        limit = SUSPECT_S if self._suspects else SILENT_S
        now = time.monotonic()
        for peer, (_, since) in heard.items():
            if now - since > limit:
                return f"{peer} has not answered for {now - since:.0f} s"
        return None


def meet(world: World) -> Peers | None:
    """Who takes part in a run (collective); None where nobody else does."""
    if world.world_size == 1:
        return None
    return Peers(world.gather(Peer(world.rank, this_process())), world.rank)
