"""Weights & Biases, which can never stop a run, nor keep it waiting. The only import of wandb.

It is called by a thread of its own, which training never waits for: a network that is gone, a disk
that hangs or its process (wandb-core) being stopped costs its metrics there, and is told once. The
end of a run waits for a while, and then kills that process, for which Python would wait for ever.
"""

import logging
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.launch import STOP_SIGNALS
from taming_dist.processes import children, name_of
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Measured, numbers

START_S = 60  # for W&B to find its server
MOST_WAITING = 1000  # calls: log points and previews
LAST_S = 60.0  # for what is left at the end of a run
KILLED_S = 5.0
SERVICE = "wandb-core"
ELSEWHERE = "the run does without it, and metrics.jsonl has all numbers"

logger = logging.getLogger(__name__)


@dataclass
class LogConfig:
    """`wandb`: auto (online if a key is configured, else offline), online, offline or disabled."""

    wandb: str = "auto"
    project: str = "taming_dist"

    def __post_init__(self) -> None:
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"log.wandb={self.wandb}: use online, offline, disabled or auto")


class WandB:
    """A run at W&B. Any failure of it is reported once and switches it off.

    The axis is a number of our own, the images seen (`trainer/samples`): W&B drops what goes back
    in its own step count after a resume, and steps go back when the global batch is raised. The run
    id is kept in run.dir, so that a resumed run is the same run there.
    """

    def __init__(self, config: LogConfig, run_dir: Path, name: str, values: dict[str, Any]) -> None:
        self._calls: queue.Queue[Callable[[Any], None]] = queue.Queue(MOST_WAITING)
        self._missed = 0
        self._is_told = self._is_closed = False
        self._thread = threading.Thread(
            target=self._work, args=(config, run_dir, name, values), name="wandb", daemon=True
        )
        self._thread.start()

    def log(self, clock: Clock, record: Measured) -> None:
        values = numbers(record) | stamp(clock)
        self._call(lambda run: run.log(values))

    def event(self, name: str, clock: Clock, details: dict[str, Any]) -> None:
        """An event as numbers: events/save is 1 where there was a save, events/save_stall_s what it
        cost; of a list, such as the keys of skipped samples, how many there are."""
        values: dict[str, float] = {f"events/{name}": 1}
        for key, value in details.items():
            if isinstance(value, list):
                values[f"events/{name}_{key}"] = len(value)
            elif isinstance(value, int | float):
                values[f"events/{name}_{key}"] = value
        values |= stamp(clock)
        self._call(lambda run: run.log(values))

    def image(self, clock: Clock, path: Path, caption: str) -> None:
        values = stamp(clock)

        def log(run: Any) -> None:
            import wandb

            run.log({"preview": wandb.Image(str(path), caption=caption)} | values)

        self._call(log)

    def note(self, text: str) -> None:
        pass

    def rewind(self, clock: Clock) -> None:
        pass

    def close(self, failed: bool) -> None:
        # after an error of the run, which may be W&B's too (a full disk), its own is no news
        self._is_told = self._is_told or failed
        end = time.monotonic() + LAST_S

        def finish(run: Any) -> None:
            self._is_closed = True
            run.finish(exit_code=int(failed))

        with suppress(queue.Full):
            if self._thread.is_alive():
                self._calls.put(finish, timeout=LAST_S)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._tell(f"W&B is off: it has not ended within {LAST_S:.0f} s")
            kill_service()
            self._thread.join(KILLED_S)
        if self._missed:
            logger.info("W&B has missed %d calls; metrics.jsonl has their numbers", self._missed)

    def _call(self, action: Callable[[Any], None]) -> None:
        """Have the thread do something with the run at W&B, unless that is off."""
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(action)
        except queue.Full:
            self._missed += 1
            self._tell("W&B does not answer")

    def _work(self, config: LogConfig, run_dir: Path, name: str, values: dict[str, Any]) -> None:
        """The thread: whatever happens in W&B, training goes on."""
        # its process inherits that: Slurm's warning, which goes to all processes, does not end it
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            run = start(config, run_dir, name, values)
            while not self._is_closed:
                self._calls.get()(run)
        except Exception as error:
            self._tell(f"W&B is off: {type(error).__name__}: {error}")
        with suppress(Exception):
            # now: at the end of Python it would wait for its process without a limit
            sys.modules["wandb"].teardown()

    def _tell(self, what: str) -> None:
        if self._is_told:
            return
        self._is_told = True
        with suppress(OSError):  # nobody is there to read it
            print(f"{' '.join(what.split())}; {ELSEWHERE}", file=sys.stderr, flush=True)


def start(config: LogConfig, run_dir: Path, name: str, values: dict[str, Any]) -> Any:
    """Begin the run at W&B, or resume it."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    id_file = run_dir / "wandb-id"
    run_id = read_id(id_file)
    if run_id is None:
        run_id = secrets.token_hex(4)
        write_bytes(id_file, run_id.encode())
    run = wandb.init(
        project=config.project,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        mode=wandb_mode(config),
        config=values,
        settings=wandb.Settings(init_timeout=START_S, console="off", x_disable_stats=True),
    )
    for handler in logging.getLogger("wandb").handlers:
        # Its own log lies in run_dir; on a full disk it would print a traceback for each line.
        handler.handleError = lambda record: None  # type: ignore[method-assign]
    run.define_metric("trainer/samples")
    run.define_metric("*", step_metric="trainer/samples")
    return run


def kill_service() -> None:
    """Kill the process that W&B has started in this one."""
    for child in children():
        if name_of(child) == SERVICE:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def read_id(path: Path) -> str | None:
    """The run's id at W&B; None where there is none yet, or none that it could have."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else None


def stamp(clock: Clock) -> dict[str, int]:
    """The present moment, as W&B gets it."""
    return {"trainer/step": clock.step, "trainer/samples": clock.images}


def wandb_mode(config: LogConfig) -> Any:
    """online, offline or disabled; auto is online only where a key is configured."""
    if config.wandb != "auto":
        return config.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.is_file() and "api.wandb.ai" in netrc.read_text(
        encoding="utf-8", errors="replace"
    )
    return "online" if known else "offline"
