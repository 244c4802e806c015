"""The decoding process of a rank, whose threads do not slow down the trainer's Python.

Parent and child share a pipe and the memory of some slots. The child writes a batch to a free slot
and sends both numbers with a record of what it wrote; the parent lends the slot's arrays to the
trainer without copying, and sends the slot's number back when nobody holds them any more. Either
notices the other's end through the pipe: nothing hangs and nothing is left behind.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import TypeVar

import numpy as np

from taming_dist.data.decoding import READING_THREADS, Decoder, Filled
from taming_dist.data.fetching import Ticket
from taming_dist.data.slots import Rows, Slots
from taming_dist.errors import UserError
from taming_dist.launch import STOP_SIGNALS
from taming_dist.memory import keep_freed_memory
from taming_dist.processes import end_with_parent

Kept = TypeVar("Kept")

START = "import sys, json; sys.path = json.loads(sys.argv[1]); from {} import main; main()"
PARENT_CHECK_S = 2.0
RARELY = 50_000  # objects made: samples come and go by thousands, and few of them form a cycle
LENT = 2  # batches: a loop still holds the previous one when it requests the next


class WorkerDied(RuntimeError):
    """The decoding process ended: killed, or out of memory."""


@dataclass(frozen=True)
class Task:
    """The child's task."""

    decoder: Decoder
    from_sample: int
    threads: int
    slots: int
    parent: int


def decode_in_process(
    decoder: Decoder, from_sample: int, threads: int, keep: Callable[[Filled, Rows], Kept]
) -> Generator[Kept, None, None]:
    """Yield `keep(filled, rows)` for the endless training batches, decoded in another process.

    `keep` may return the rows' own arrays: they are reused once they are dropped. Raises what the
    child raised: a `UserError` as it is, other errors as a `RuntimeError` with the child's
    traceback, and `WorkerDied` if it was killed.
    """
    slots = Slots(decoder.layout, threads + 2 + LENT)
    loans = Loans(slots)
    ours, theirs = Pipe()
    process = start_child(theirs, slots)
    theirs.close()
    os.close(slots.descriptor)

    def kept(filled: Filled, slot: int) -> Kept:
        result = keep(filled, loans.lend(slot))
        for free in loans.returned():
            ours.send(free)
        return result

    try:
        ours.send(Task(decoder, from_sample, threads, len(slots), os.getpid()))
        arrived: dict[int, tuple[int, Filled | Exception]] = {}
        for number in count():
            while number not in arrived:
                index, slot, message = ours.recv()
                arrived[index] = slot, message
            slot, filled = arrived.pop(number)
            if isinstance(filled, Exception):
                raise filled
            yield kept(filled, slot)  # not bound to a name, which would keep the batch alive
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(
            f"the process that decodes images ended with code {process.wait()} "
            f"(-9: it was killed, perhaps for lack of memory: lower data.threads)"
        ) from error
    finally:
        ours.close()
        process.kill()
        process.wait()


class Loans:
    """The full slots: those whose arrays are still referenced by the consumer or a view."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._lent: dict[int, list[weakref.ref[np.ndarray]]] = {}

    def lend(self, slot: int) -> Rows:
        """The rows of a full slot; copies if `LENT` are held, as the child needs the others."""
        rows = self._slots[slot]
        held = sum(map(_is_held, self._lent.values()))
        self._lent[slot] = [weakref.ref(array) for array in rows.arrays()]
        return rows if held < LENT else rows.copy()

    def returned(self) -> list[int]:
        """The slots that became free since the last call."""
        free = [slot for slot, arrays in self._lent.items() if not _is_held(arrays)]
        for slot in free:
            del self._lent[slot]
        return free


def _is_held(arrays: list[weakref.ref[np.ndarray]]) -> bool:
    return any(array() is not None for array in arrays)


def start_child(connection: Connection, slots: Slots) -> subprocess.Popen[bytes]:
    """Start a new Python rather than fork (CUDA, threads) or spawn (which re-imports __main__).

    The signals that the trainer handles stay blocked in the child from the start.
    """
    descriptors = (connection.fileno(), slots.descriptor)
    command = [sys.executable, "-I", "-c", START.format(__name__), json.dumps(sys.path)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(
            [*command, *map(str, descriptors)], pass_fds=descriptors, stdin=subprocess.DEVNULL
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main() -> None:
    """The child: decode until the parent is gone or stops reading."""
    end_with_parent(signal.SIGKILL)  # also while it is stopped
    yield_to_trainer()
    keep_freed_memory(one_heap=True)
    connection, descriptor = Connection(int(sys.argv[2])), int(sys.argv[3])
    try:
        task: Task = connection.recv()
        child = Child(connection, task, Slots(task.decoder.layout, task.slots, descriptor))
        gc.freeze()
        gc.set_threshold(RARELY)
        child.run()
    except (EOFError, ConnectionError):
        pass
    # Not sys.exit, which would wait for threads that may be reading from a slow store.
    os._exit(0)


def yield_to_trainer() -> None:
    """Have Linux not preempt the trainer when it wakes this process; no effect elsewhere."""
    # A container may forbid this, which costs a fraction of a millisecond per batch.
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Child:
    """A decoder of batches in threads that sends each as soon as it is finished."""

    def __init__(self, connection: Connection, task: Task, slots: Slots) -> None:
        self._connection, self._task, self._slots = connection, task, slots
        self._sending = Lock()

    def run(self) -> None:
        """Decode until the parent closes the pipe, which raises EOFError."""
        task = self._task
        decoding = ThreadPoolExecutor(task.threads)
        free = list(range(len(self._slots)))
        number = 0
        try:
            batches = task.decoder.training(task.from_sample, ThreadPoolExecutor(READING_THREADS))
            for number, tickets in enumerate(batches):
                slot = free.pop() if free else self._wait_for_slot()
                decoding.submit(self._decode, number, slot, tickets)
        except Exception as error:
            if isinstance(error, (EOFError, ConnectionError)):
                raise
            self._send(number, 0, portable(error))
        while True:
            self._wait_for_slot()

    def _decode(self, number: int, slot: int, tickets: Iterable[Ticket]) -> None:
        try:
            filled = self._task.decoder.fill(tickets, self._slots[slot], replace=True)
        except Exception as error:
            self._send(number, slot, portable(error))
        else:
            self._send(number, slot, filled)

    def _send(self, number: int, slot: int, message: Filled | Exception) -> None:
        with self._sending:
            self._connection.send((number, slot, message))

    def _wait_for_slot(self) -> int:
        """Wait until the parent returns a slot, and take it."""
        while not self._connection.poll(PARENT_CHECK_S):
            # A process forked by the parent may keep the pipe open after the parent's end.
            if os.getppid() != self._task.parent:
                raise EOFError
        slot: int = self._connection.recv()
        return slot


def portable(error: Exception) -> Exception:
    """An error that can be sent: a `UserError` unchanged, others with their traceback as text."""
    if isinstance(error, UserError):
        return error
    text = "".join(traceback.format_exception(error))
    return RuntimeError(f"the process that decodes images failed:\n{text}")
