"""torch.compile while it works: signals wait until it is done, and what it does twice is told.

It starts compilers and workers, children that a launcher's TERM reaches as well: it goes to the
whole process group. Without its compiler a step fails, and for what its workers were to give torch
waits for ever (2.8 to 2.13, pytorch/pytorch#189290). Children inherit which signals are blocked,
and end with this process all the same: their pipes to it end. Ctrl-C is not held back: two of them
that wait would count as one, and the second has to end the run at once; torch's workers ignore it.

`torch._dynamo.callback` and the metrics of compilations are private names of torch, used only here;
its import takes seconds, which only a run that compiles has to wait for.
"""

import logging
import signal
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
HELD_BACK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LONGEST = 200  # characters of a reason


class Compilations:
    """Those of this process; `forward` counts the compiled forward passes."""

    def __init__(self) -> None:
        from torch._dynamo.callback import CallbackTrigger, callback_handler

        self.forward = 0
        self._before: set[int | signal.Signals] = set()
        self._first = CallbackTrigger.DYNAMO
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, compilation: Any) -> None:
        self.forward += compilation.callback_trigger is self._first
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)

    def _end(self, compilation: Any) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


@cache
def compilations() -> Compilations:
    """Follow what torch compiles in this process from the first call on."""
    return Compilations()


class Recompilations:
    """What is compiled again after an engine's first optimizer step, in which all should have been:
    a step waits seconds for each."""

    def __init__(self) -> None:
        self._compilations = compilations()
        self._counted: int | None = None  # of `forward`; None before the end of the first step
        self._told: set[str] = set()

    def step_done(self) -> None:
        """Count from the end of the first optimizer step on."""
        from torch._dynamo.utils import clear_compilation_metrics

        if self._counted is None:
            self._counted = self._compilations.forward
            clear_compilation_metrics()

    def take(self) -> int:
        """How many there were since the last call; each reason is logged once."""
        if self._counted is None:
            return 0
        found = self._compilations.forward - self._counted
        self._counted += found
        if found:
            self._tell()
        return found

    def _tell(self) -> None:
        from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

        for made in get_compilation_metrics():
            if made.is_forward is False or made.co_name is None:  # of a backward pass
                continue
            reason = " ".join((made.recompile_reason or "a new function").split())[:LONGEST]
            place = f"{Path(made.co_filename or '').name}:{made.co_firstlineno}"
            line = f"{made.co_name} ({place}) was compiled again after the first step: {reason}"
            if line not in self._told:
                self._told.add(line)
                logger.warning("%s", line)
        clear_compilation_metrics()
