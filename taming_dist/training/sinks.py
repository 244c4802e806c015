"""Where a run tells what it does: metrics.jsonl, events.jsonl, the console, previews, W&B.

Rank 0 alone writes. metrics.jsonl is the truth; W&B gets the same numbers and can never stop a run.
The only import of wandb.
"""

import dataclasses
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from taming_dist.errors import UserError
from taming_dist.formats.files import write_bytes, writing
from taming_dist.formats.png import save_png
from taming_dist.formats.strict_json import json_safe
from taming_dist.training.clock import Clock
from taming_dist.training.console import Console
from taming_dist.training.recipe import Measured, Preview, numbers

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class LogConfig:
    """`wandb`: auto (online if a key is configured, else offline), online, offline or disabled."""

    wandb: str = "auto"
    project: str = "taming_dist"

    def __post_init__(self) -> None:
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"log.wandb={self.wandb}: use online, offline, disabled or auto")


class Sink(Protocol):
    """One place that metrics go to."""

    def log(self, clock: Clock, record: Measured) -> None: ...
    def image(self, clock: Clock, path: Path, caption: str) -> None: ...
    def note(self, text: str) -> None: ...
    def rewind(self, clock: Clock) -> None: ...
    def close(self, failed: bool) -> None: ...


class Sinks:
    """All sinks of a run; with no run directory (every rank but the first) it is silent."""

    def __init__(self, run_dir: Path | None, sinks: list[Sink]) -> None:
        self.run_dir = run_dir
        self._sinks = sinks

    def log(self, clock: Clock, record: Measured) -> None:
        """Numbers by name, such as train/rec, at the present step; curves go to the file only."""
        for sink in self._sinks:
            sink.log(clock, record)

    def logged(self, clock: Clock, group: str) -> Measured | None:
        """What metrics.jsonl has of a group, such as val, of the present moment, by names without
        it; None where it has nothing, and on every rank but the first."""
        return None if self.run_dir is None else MetricsFile(self.run_dir).find(clock, group)

    def image(self, clock: Clock, preview: Preview | None) -> None:
        """A preview: images/images-000000012000.png, by images seen."""
        if self.run_dir is None or preview is None:
            return
        path = self.run_dir / "images" / f"images-{clock.images:012d}.png"
        save_png(preview.picture, path, preview.caption)
        for sink in self._sinks:
            sink.image(clock, path, preview.caption)

    def event(self, name: str, clock: Clock, **details: Any) -> None:
        """A line of events.jsonl: start, resume, save, save_failed, best, signal, skip,
        error, exit."""
        if self.run_dir is None:
            return
        line = {"event": name, "step": clock.step, "samples": clock.images, "time": time.time()}
        append_line(self.run_dir / "events.jsonl", line | details)

    def note(self, text: str) -> None:
        """A line for the person at the terminal."""
        for sink in self._sinks:
            sink.note(text)

    def rewind(self, clock: Clock) -> None:
        """The run resumes from an earlier moment: what was logged after it did not happen."""
        for sink in self._sinks:
            sink.rewind(clock)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for sink in self._sinks:
            sink.close(failed=error is not None)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object on a line of its own, also after one that a crash has torn.

    The folder is made where it is missing. A number that is not finite is left out: JSON has none.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(json_safe(values), allow_nan=False).encode() + b"\n")


class MetricsFile:
    """metrics.jsonl: one object per log point or validation, with step, samples and time."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"

    def log(self, clock: Clock, record: Measured) -> None:
        stamp = {"step": clock.step, "samples": clock.images, "time": time.time()}
        append_line(self.path, {**stamp, **record})

    def image(self, clock: Clock, path: Path, caption: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def rewind(self, clock: Clock) -> None:
        """Cut what was logged after the images seen, and a line that was torn by a crash."""
        if not self.path.is_file():
            return
        read = list(self._read())
        damaged = [number for number, (_, values) in enumerate(read, 1) if values is None]
        for number in damaged:
            if number < len(read):  # the last one may be torn by any crash
                logger.warning("%s: line %d is damaged and was left out", self.path, number)
        kept = [line for line, values in read if values and values["samples"] <= clock.images]
        with writing(self.path.parent):
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def find(self, clock: Clock, group: str) -> Measured | None:
        """The metrics of a group, such as val, of the present moment, by names without it; None
        where there are none."""
        if not self.path.is_file():
            return None
        read = (values for _, values in self._read() if values)
        here = (values for values in read if values["samples"] == clock.images)
        found: dict[str, Any] = {
            name.partition("/")[2]: value
            for values in here
            for name, value in values.items()
            if name.startswith(f"{group}/")
        }
        return found or None

    def _read(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Each line and what it says; None where it is torn by a crash, or damaged."""
        for line in self.path.read_bytes().splitlines():
            try:
                values = json.loads(line)
                is_record = isinstance(values["samples"], int)
            except (ValueError, KeyError, TypeError):
                is_record = False
            yield line, values if is_record else None

    def close(self, failed: bool) -> None:
        pass


class WandB:
    """Weights & Biases, rank 0 only. Any failure of it is reported once and switches it off.

    The axis is a number of our own, the images seen (`trainer/samples`): W&B drops what goes back
    in its own step count after a resume, and steps go back when the global batch is raised. The run
    id is kept in run.dir, so that a resumed run is the same run there.
    """

    def __init__(self, config: LogConfig, run_dir: Path, name: str, values: dict[str, Any]) -> None:
        self._run: Any = None
        self._guard(lambda: self._start(config, run_dir, name, values))

    def _start(self, config: LogConfig, run_dir: Path, name: str, values: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb
        id_file = run_dir / "wandb-id"
        run_id = read_id(id_file)
        if run_id is None:
            run_id = secrets.token_hex(4)
            write_bytes(id_file, run_id.encode())
        self._run = wandb.init(
            project=config.project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            mode=wandb_mode(config),
            config=values,
            settings=wandb.Settings(init_timeout=60, console="off", x_disable_stats=True),
        )
        for handler in logging.getLogger("wandb").handlers:
            # Its own log lies in run_dir; on a full disk it would print a traceback for each line.
            handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._run.define_metric("trainer/samples")
        self._run.define_metric("*", step_metric="trainer/samples")

    def log(self, clock: Clock, record: Measured) -> None:
        self._guard(lambda: self._run and self._run.log(numbers(record) | stamp(clock)))

    def image(self, clock: Clock, path: Path, caption: str) -> None:
        def log() -> None:
            if self._run:
                shown = self._wandb.Image(str(path), caption=caption)
                self._run.log({"preview": shown} | stamp(clock))

        self._guard(log)

    def note(self, text: str) -> None:
        pass

    def rewind(self, clock: Clock) -> None:
        pass

    def close(self, failed: bool) -> None:
        # after an error of the run, which may be W&B's too (a full disk), its own is no news
        self._guard(lambda: self._run and self._run.finish(exit_code=int(failed)), quiet=failed)

    def _guard(self, action: Callable[[], Any], quiet: bool = False) -> None:
        try:
            action()
        except Exception as error:  # whatever happens in W&B, training goes on
            self._run = None
            if not quiet:
                print(f"W&B is off: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


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


def open_sinks(
    config: LogConfig, run_dir: Path, name: str, clock: Clock, values: dict[str, Any]
) -> Sinks:
    """The sinks of the first rank."""
    sinks: list[Sink] = [MetricsFile(run_dir), Console(clock, name)]
    if wandb_mode(config) != "disabled":
        sinks.append(WandB(config, run_dir, name, values))
    return Sinks(run_dir, sinks)
