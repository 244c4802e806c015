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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.launch import STOP_SIGNALS
from taming_dist.processes import children, name_of
from taming_dist.ranges import check_choice
from taming_dist.training.artifacts import Artifact, Describe
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import CODE_COUNTS, Measured, numbers
from taming_dist.training.wandb_steps import Steps

START_S = 60  # for W&B to find its server
MOST_BARS = 512  # that W&B shows of a histogram
MOST_WAITING = 1000  # calls: log points and previews
LAST_S = 60.0  # for what is left at the end of a run
KILLED_S = 5.0
SERVICE = "wandb-core"
ELSEWHERE = "the run does without it, and metrics.jsonl has all numbers"

logger = logging.getLogger(__name__)


@dataclass
class LogConfig:
    """`wandb`: auto (online if a key is configured, else offline), online, offline or disabled.

    `group`: what W&B groups runs by, such as those of a chain (null: WANDB_RUN_GROUP, if it is
    set). `artifacts`: none, references (what a run reads and makes, by fingerprint, place and size,
    with small files), or files (the weights of what it makes, too).
    """

    wandb: str = "auto"
    project: str = "taming_dist"
    group: str | None = None
    artifacts: str = "references"

    def __post_init__(self) -> None:
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"log.wandb={self.wandb}: use online, offline, disabled or auto")
        check_choice("log.artifacts", self.artifacts, ("none", "references", "files"))


class WandB:
    """A run at W&B. Any failure of it is reported once and switches it off.

    The axis is a number of our own, the images seen (`trainer/samples`): W&B drops what goes back
    in its own step count after a resume, and steps go back when the global batch is raised. The run
    id is kept in run.dir, so that a resumed run is the same run there; online its history is
    rewound to where the run resumes. It begins with `rewind`, or with what is logged first.
    """

    def __init__(
        self,
        config: LogConfig,
        run_dir: Path,
        name: str,
        values: dict[str, Any],
        job: str = "train",
    ) -> None:
        self._calls: queue.Queue[Callable[[Any], None]] = queue.Queue(MOST_WAITING)
        self._missed = 0
        self._is_told = self._is_closed = False
        self._artifacts = config.artifacts
        self._begun = threading.Event()
        self._resumed_at: int | None = None
        self._steps = Steps(run_dir) if wandb_mode(config) == "online" else None
        begin = partial(start, config, run_dir, name, values, job)
        self._thread = threading.Thread(target=self._work, args=(begin,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, clock: Clock, record: Measured) -> None:
        counts = {name: own for name, own in record.items() if name.endswith(f"/{CODE_COUNTS}")}
        bars = {name: bars_of(own) for name, own in counts.items() if isinstance(own, list)}

        def histograms() -> dict[str, Any]:
            import wandb

            return {name: wandb.Histogram(np_histogram=own) for name, own in bars.items()}

        self._log(clock, numbers(record), histograms if bars else None)

    def event(self, name: str, clock: Clock, details: dict[str, Any]) -> None:
        """An event as numbers: events/save is 1 where there was a save, events/save_stall_s what it
        cost; of a list, such as the keys of skipped samples, how many there are."""
        values: dict[str, float] = {f"events/{name}": 1}
        for key, value in details.items():
            if isinstance(value, list):
                values[f"events/{name}_{key}"] = len(value)
            elif isinstance(value, int | float):
                values[f"events/{name}_{key}"] = value
        self._log(clock, values)

    def image(self, clock: Clock, path: Path, caption: str) -> None:
        def picture() -> dict[str, Any]:
            import wandb

            return {"preview": wandb.Image(str(path), caption=caption)}

        self._log(clock, {}, picture)

    def artifact(self, describe: Describe, made: bool) -> None:
        """Something that the run has read, or `made`; what cannot be described is left out."""

        def tell(run: Any) -> None:
            try:
                attach(run, describe(), made, with_weights=self._artifacts == "files")
            except Exception as error:
                logger.info("W&B's lineage lacks an artifact: %s", error)

        if self._artifacts != "none":
            self._call(tell)

    def note(self, text: str) -> None:
        pass

    def rewind(self, clock: Clock) -> None:
        self._resumed_at = clock.images
        self._begun.set()

    def close(self, failed: bool) -> None:
        # after an error of the run, which may be W&B's too (a full disk), its own is no news
        self._is_told = self._is_told or failed
        end = time.monotonic() + LAST_S

        def finish(run: Any) -> None:
            self._is_closed = True
            run.finish(exit_code=int(failed))

        self._begun.set()
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

    def _log(
        self, clock: Clock, values: Mapping[str, float], media: Callable[[], Any] | None = None
    ) -> None:
        """Log a row at the present moment; its `media` are made by the thread."""
        stamped, images, steps = {**values, **stamp(clock)}, clock.images, self._steps

        def log(run: Any) -> None:
            run.log(stamped if media is None else media() | stamped)
            if steps is not None:
                steps.note(images, run.step - 1)

        self._begun.set()
        self._call(log)

    def _call(self, action: Callable[[Any], None]) -> None:
        """Have the thread do something with the run at W&B, unless that is off."""
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(action)
        except queue.Full:
            self._missed += 1
            self._tell("W&B does not answer")

    def _work(self, begin: Callable[[int | None, Steps | None], Any]) -> None:
        """The thread: whatever happens in W&B, training goes on."""
        # its process inherits that: Slurm's warning, which goes to all processes, does not end it
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            import wandb  # takes seconds, in which the run comes to where it begins

            self._begun.wait()
            run = begin(self._resumed_at, self._steps)
            while not self._is_closed:
                self._calls.get()(run)
        except Exception as error:
            self._tell(f"W&B is off: {type(error).__name__}: {error}")
        with suppress(Exception):
            # now: at the end of Python it would wait for its process without a limit
            wandb.teardown()

    def _tell(self, what: str) -> None:
        if self._is_told:
            return
        self._is_told = True
        with suppress(OSError):  # nobody is there to read it
            print(f"{' '.join(what.split())}; {ELSEWHERE}", file=sys.stderr, flush=True)


def start(
    config: LogConfig,
    run_dir: Path,
    name: str,
    values: dict[str, Any],
    job: str,
    images: int | None,
    steps: Steps | None,
) -> Any:
    """Begin the run at W&B, or resume it after so many images; `steps`: those that it has there.
    Where either is None it is not rewound."""
    os.environ.setdefault("WANDB_SILENT", "true")
    # what artifacts hold waits there to be sent, maybe by another machine: not in a home folder
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").absolute()))
    import wandb

    id_file = run_dir / "wandb-id"
    run_id = read_id(id_file)
    if run_id is None:
        run_id = secrets.token_hex(4)
        write_bytes(id_file, run_id.encode())
    init = partial(
        wandb.init,
        project=config.project,
        group=config.group,
        job_type=job,
        name=name,
        id=run_id,
        dir=str(run_dir),
        mode=wandb_mode(config),
        config=values,
        settings=wandb.Settings(init_timeout=START_S, console="off"),
    )
    run = None
    if steps is not None and images is not None and (last := steps.before(images)) is not None:
        try:
            run = init(resume_from=f"{run_id}?_step={last}")
        except Exception as error:  # not every server can; the run then has some images twice
            logger.info("W&B has not rewound the run to %d images: %s", images, error)
        else:
            steps.cut(images)
    if run is None:
        run = init(resume="allow")
    for handler in logging.getLogger("wandb").handlers:
        # Its own log lies in run_dir; on a full disk it would print a traceback for each line.
        handler.handleError = lambda record: None  # type: ignore[method-assign]
    run.define_metric("trainer/samples")
    run.define_metric("*", step_metric="trainer/samples")
    return run


def attach(run: Any, artifact: Artifact, made: bool, with_weights: bool) -> None:
    """Tell W&B that the run has made something, or has read it."""
    import wandb

    told = wandb.Artifact(artifact.name, type=artifact.type, metadata=dict(artifact.facts))
    with told.new_file("artifact.json") as file:
        file.write(artifact.description)
    for path in artifact.small_files:
        told.add_file(str(path), skip_cache=True)
    if made:
        run.log_artifact(told)
    else:
        # What run.use_artifact does with an artifact of unknown version, but that this refuses to
        # do so offline, and online waits for the server, and metrics with it.
        run._log_artifact(told, is_user_created=True, use_after_commit=True)
    if made and with_weights and artifact.weights is not None:
        # of its own, so that all know the other one by the same files
        weights = wandb.Artifact(f"{artifact.name}-weights", type="weights")
        weights.add_file(str(artifact.weights), skip_cache=True)
        run.log_artifact(weights)


def bars_of(counts: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A histogram of how often each code was used [K]: the uses in as many equal ranges of code
    numbers as W&B shows, and where these begin and end."""
    edges = np.linspace(0, len(counts), min(len(counts), MOST_BARS) + 1).astype(int)
    return np.add.reduceat(np.asarray(counts, dtype=float), edges[:-1]), edges


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
