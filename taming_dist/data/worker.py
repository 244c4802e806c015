"""The process that decodes for one rank: threads there do not slow the trainer's Python down.

Parent and child share a pipe and the memory of some slots. The child writes batch n to slot
n mod slots and sends n with what it wrote; the parent answers when it has copied it, which frees
the slot. Either notices the other's end by the end of the pipe: nothing hangs, nothing stays.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import TypeVar

from taming_dist.data.decoding import READING_THREADS, Decoder, Filled
from taming_dist.data.fetching import Ticket
from taming_dist.data.slots import Rows, Slots
from taming_dist.errors import UserError

Kept = TypeVar("Kept")

# Answered by the trainer, which then ends the child; it would lose batches if it took them itself.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
START = "import sys, json; sys.path = json.loads(sys.argv[1]); from {} import main; main()"
PARENT_CHECK_S = 2.0


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

    `keep` has to copy the rows: they are written to again. Raises what the child raised; an
    error of its code, with its traceback, as `RuntimeError`; `WorkerDied` if it was killed.
    """
    slots = Slots(decoder.layout, threads + 2)
    ours, theirs = Pipe()
    process = start_child(theirs, slots)
    theirs.close()
    os.close(slots.descriptor)
    try:
        ours.send(Task(decoder, from_sample, threads, len(slots), os.getpid()))
        arrived: dict[int, Filled | Exception] = {}
        for number in count():
            while number not in arrived:
                index, message = ours.recv()
                arrived[index] = message
            filled = arrived.pop(number)
            if isinstance(filled, Exception):
                raise filled
            kept = keep(filled, slots[number])
            ours.send(number)
            yield kept
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(
            f"the process that decodes images ended with code {process.wait()} "
            f"(-9: it was killed, perhaps because memory ran out: lower data.threads)"
        ) from error
    finally:
        ours.close()
        process.kill()
        process.wait()


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
    connection, descriptor = Connection(int(sys.argv[2])), int(sys.argv[3])
    try:
        task: Task = connection.recv()
        Child(connection, task, Slots(task.decoder.layout, task.slots, descriptor)).run()
    except (EOFError, ConnectionError):
        pass
    # Not sys.exit, which would wait for threads that may be reading from a slow store.
    os._exit(0)


class Child:
    """Decodes batches in threads and sends each as soon as it is there."""

    def __init__(self, connection: Connection, task: Task, slots: Slots) -> None:
        self._connection, self._task, self._slots = connection, task, slots
        self._sending = Lock()

    def run(self) -> None:
        """Decode until the parent closes the pipe, which raises EOFError."""
        task = self._task
        decoding = ThreadPoolExecutor(task.threads)
        number = 0
        try:
            batches = task.decoder.training(task.from_sample, ThreadPoolExecutor(READING_THREADS))
            for number, tickets in enumerate(batches):
                if number >= len(self._slots):
                    self._wait_for_parent()
                decoding.submit(self._decode, number, tickets)
        except Exception as error:
            if isinstance(error, (EOFError, ConnectionError)):
                raise
            self._send(number, portable(error))
        while True:
            self._wait_for_parent()

    def _decode(self, number: int, tickets: Iterable[Ticket]) -> None:
        try:
            filled = self._task.decoder.fill(tickets, self._slots[number], replace=True)
        except Exception as error:
            self._send(number, portable(error))
        else:
            self._send(number, filled)

    def _send(self, number: int, message: Filled | Exception) -> None:
        with self._sending:
            self._connection.send((number, message))

    def _wait_for_parent(self) -> None:
        """Wait until the parent has emptied one more slot."""
        while not self._connection.poll(PARENT_CHECK_S):
            # A process that the parent forked may hold the pipe open beyond its end.
            if os.getppid() != self._task.parent:
                raise EOFError
        self._connection.recv()


def portable(error: Exception) -> Exception:
    """The error as it can be sent: a user's mistake as it is, others with their traceback."""
    if isinstance(error, UserError):
        return error
    text = "".join(traceback.format_exception(error))
    return RuntimeError(f"the process that decodes images failed:\n{text}")
