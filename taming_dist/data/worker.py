"""The process that decodes for one rank: threads there do not slow the trainer's Python down.

Parent and child share a pipe and the memory of some slots. The child writes a batch to a free slot
and sends the numbers of both with what it wrote; the parent lends the arrays in the slot to the
trainer, without a copy, and sends the slot's number back when nobody holds them any more. Either
notices the other's end by the end of the pipe: nothing hangs, nothing stays.
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
from taming_dist.memory import keep_freed_memory

Kept = TypeVar("Kept")

# Answered by the trainer, which then ends the child; it would lose batches if it took them itself.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
START = "import sys, json; sys.path = json.loads(sys.argv[1]); from {} import main; main()"
PARENT_CHECK_S = 2.0
RARELY = 50_000  # objects made: samples come and go by thousands, and few of them form a cycle
LENT = 2  # batches: a loop still holds the one before when it asks for the next


class WorkerDied(RuntimeError):
    """The process that decodes ended: killed, or out of memory."""


@dataclass(frozen=True)
class Task:
    """What the child gets to do."""

    decoder: Decoder
    from_sample: int
    threads: int
    slots: int
    parent: int


def decode_in_process(
    decoder: Decoder, from_sample: int, threads: int, keep: Callable[[Filled, Rows], Kept]
) -> Generator[Kept, None, None]:
    """Yield `keep(filled, rows)` of the endless batches of training, decoded in another process.

    `keep` may return arrays of the rows as they are: they are written to again when they are
    dropped. Raises what the child raised; an error of its code, with its traceback, as
    `RuntimeError`; `WorkerDied` if it was killed.
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
            yield kept(filled, slot)  # no name here: it would keep the batch alive
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(
            f"the process that decodes images ended with code {process.wait()} "
            f"(-9: it was killed, perhaps because memory ran out: lower data.threads)"
        ) from error
    finally:
        ours.close()
        process.kill()
        process.wait()


class Loans:
    """Which slots are full: those whose arrays the consumer, or a view of them, still refers to."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._lent: dict[int, list[weakref.ref[np.ndarray]]] = {}

    def lend(self, slot: int) -> Rows:
        """The rows of a full slot; copies if `LENT` are held: the child needs the others."""
        rows = self._slots[slot]
        held = sum(map(_is_held, self._lent.values()))
        self._lent[slot] = [weakref.ref(array) for array in rows.arrays()]
        return rows if held < LENT else rows.copy()

    def returned(self) -> list[int]:
        """The slots that are free again since the last call."""
        free = [slot for slot, arrays in self._lent.items() if not _is_held(arrays)]
        for slot in free:
            del self._lent[slot]
        return free


def _is_held(arrays: list[weakref.ref[np.ndarray]]) -> bool:
    return any(array() is not None for array in arrays)


def start_child(connection: Connection, slots: Slots) -> subprocess.Popen[bytes]:
    """Start Python anew rather than fork (CUDA, threads) or spawn (which imports __main__ again).

    The signals that the trainer answers stay blocked in the child, from its first moment on.
    """
    descriptors = (connection.fileno(), slots.descriptor)
    command = [sys.executable, "-I", "-c", START.format(__name__), json.dumps(sys.path)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        return subprocess.Popen(
            [*command, *map(str, descriptors)], pass_fds=descriptors, stdin=subprocess.DEVNULL
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main() -> None:
    """The child: decode until the parent is gone or wants no more."""
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
    """Have Linux let the trainer go on when it wakes this process; elsewhere nothing is changed."""
    # A container may forbid it, which costs a fraction of a millisecond per batch.
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Child:
    """Decodes batches in threads and sends each as soon as it is there."""

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
        """Wait until the parent gives a slot back, and take it."""
        while not self._connection.poll(PARENT_CHECK_S):
            # A process that the parent forked may hold the pipe open beyond its end.
            if os.getppid() != self._task.parent:
                raise EOFError
        slot: int = self._connection.recv()
        return slot


def portable(error: Exception) -> Exception:
    """The error as it can be sent: a user's mistake as it is, others with their traceback."""
    if isinstance(error, UserError):
        return error
    text = "".join(traceback.format_exception(error))
    return RuntimeError(f"the process that decodes images failed:\n{text}")
