"""Processes: whether one of this host still runs, and ending together with the one that started
this one."""

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Process:
    """A process on some host. `birth` tells it from a later one with the same number, and says
    where that number counts: see `birth_of`. It is empty where the system does not tell."""

    host: str
    pid: int
    birth: str = ""

    @property
    def is_here(self) -> bool:
        """Whether this process could see it: the same host, boot and container."""
        return self.host == socket.gethostname() and (
            not self.birth or self.birth.startswith(_realm())
        )

    @property
    def state(self) -> str:
        """What /proc says of it: R, S, D, T (stopped) ...; empty if it is not here or has ended."""
        state, birth = _found(self.pid)
        return state if birth == self.birth else ""

    @property
    def is_running(self) -> bool:
        """Whether it is here and has not ended."""
        if not self.is_here:
            return False
        if self.birth:
            return birth_of(self.pid) == self.birth
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def this_process() -> Process:
    """The process that asks."""
    return Process(socket.gethostname(), os.getpid(), birth_of(os.getpid()))


def birth_of(pid: int) -> str:
    """When and where a process of this host was started: boot, namespace of process numbers, and
    clock ticks since the boot. Empty if it has ended, and where there is no /proc."""
    return _found(pid)[1]


def state_of(pid: int) -> str:
    """What /proc says of a process of this host: R, S, D, T (stopped) ...; empty if it has ended,
    and where there is no /proc."""
    return _found(pid)[0]


def name_of(pid: int) -> str:
    """The name of the program that a process of this host runs, its first 15 letters; empty where
    it has ended, and where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def children() -> list[int]:
    """The processes that this one has started and that are still there; none where there is no
    /proc."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, path.read_text().split())
    return found


def _found(pid: int) -> tuple[str, str]:
    """The state and the birth of a process, read together."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return "", ""
    return ("", "") if state in "ZX" else (state, f"{_realm()}{rest[18]}")


@cache
def _realm() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} "
    except OSError:
        return ""


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this process a signal when its parent ends, or now if it just did.

    Only Linux can; to be called before threads are started. What counts as the parent's end is
    that of the thread which started this process.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
