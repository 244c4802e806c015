"""How a run ends: events.jsonl, the logs of the ranks and the terminal say why, whatever it is."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from taming_dist import cli
from taming_dist.engine.outcome import write_outcome
from taming_dist.engine.world import World
from taming_dist.errors import Diverged, LostRank, UserError
from taming_dist.formats.files import writing
from taming_dist.training.clock import Clock
from taming_dist.training.signals import outlast_the_launcher
from taming_dist.training.sinks import Sinks

logger = logging.getLogger(__name__)


@contextmanager
def ending(run_dir: Path, world: World, clock: Clock) -> Iterator[ExitStack]:
    """Keep this rank's log, and tell the reason if the run ends by an error.

    What is entered into the given stack is closed at any end; after an error, once it is told. With
    several ranks an error ends the process here, and in one line: no rank waits for another.
    """
    with rank_log(run_dir, world.rank) as log, ExitStack() as stack:
        try:
            yield stack
        except Exception as error:
            outlast_the_launcher()
            ours = isinstance(error, (UserError, Diverged, LostRank))  # the message says it all
            reason = str(error) if ours else f"{type(error).__name__}: {error}"
            logger.error("%s", reason, exc_info=error.__cause__ if ours else error)
            if world.is_first or not isinstance(error, (Diverged, LostRank)):
                tell(run_dir, world, clock, reason)
            with cli.one_line(log if world.world_size > 1 else None):
                raise error


def tell(run_dir: Path, world: World, clock: Clock, reason: str) -> None:
    """Write why the run ends early into events.jsonl: the first rank as `exit`, which every end
    has, the others as `error`."""
    events = Sinks(run_dir, [])
    if world.is_first:
        write_outcome(clock.step, clock.images, finished=False, reason=reason)
    with suppress(OSError, UserError):  # a full disk may be the very reason; it must not hide it
        if world.is_first:
            events.event("exit", clock, finished=False, reason=reason)
        else:
            events.event("error", clock, rank=world.rank, reason=reason)


class RankLog(logging.FileHandler):
    """A log whose own errors are not told: those of a full disk end the run with a line anyway."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def log_of(run_dir: Path, rank: int) -> Path:
    """The file of `rank_log`."""
    return run_dir / "logs" / f"rank-{rank}.log"


@contextmanager
def rank_log(run_dir: Path, rank: int) -> Iterator[Path]:
    """This rank's log, logs/rank-N.log; the first rank's warnings go to stderr as well."""
    path = log_of(run_dir, rank)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = RankLog(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        console.addFilter(lambda record: record.name != __name__)  # errors get a line of their own
        handlers.append(console)
    root = logging.getLogger("taming_dist")
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield path
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
