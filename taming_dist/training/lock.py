"""One run per run directory: two would write the same files.

The first rank claims the folder (`engine/claims.py`): run.dir/run.claim says who has it. Of a run
on this host it is known at once whether it still runs, however it ended. One on another host that
was killed merely stops renewing its claim, so the next start watches that for a while: by its own
clock alone, which cannot jump, as those of hosts and file systems may. A job that Slurm has started
again waits for its former start, which may still be ending.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from taming_dist.cli import EXIT_ERROR
from taming_dist.engine.claims import STALE_S, Claim, Claims
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.formats.files import writing

NAME = "run"
LOOK_AGAIN_S = 1.0
FORMER_S = 600.0  # for the former start of the same job to end


@contextmanager
def locked(run_dir: Path, stale_s: float = STALE_S) -> Iterator[None]:
    """Have `run_dir` to ourselves. It is made if need be, and removed again if it stays empty.

    `stale_s`: seconds without renewal after which a run on another host is taken for dead.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    claims = Claims(run_dir, stale_s, lost=lambda _: end_at_once(run_dir))
    found = claims.find(NAME)
    if found is not None and found.owner.is_running and not is_former(found):
        raise in_use(run_dir, found)  # before anything is touched
    is_new = not run_dir.exists()
    with ExitStack() as stack:
        if is_new:
            stack.callback(remove_empty, run_dir)
        with writing(run_dir):
            stack.enter_context(claims)
            wait_for(claims, run_dir)
        yield


@contextmanager
def locked_for_all(run_dir: Path, world: World) -> Iterator[None]:
    """Have `run_dir` to this run, whose first rank claims it (collective: no rank has touched the
    folder when another has failed before they met).

    Raises:
        UserError: as `locked` does, on all ranks.
    """
    with ExitStack() as stack:
        refused = ""
        if world.is_first:
            try:
                stack.enter_context(locked(run_dir))
            except UserError as error:
                refused = str(error)
        if refused := world.broadcast(refused):
            raise UserError(refused)
        yield


def remove_empty(folder: Path) -> None:
    """Remove a folder unless there is something in it."""
    with suppress(OSError):
        folder.rmdir()


class Watch:
    """The claim of another run, as one sees it who looks again and again.

    `renewed`: it was, meanwhile.
    """

    def __init__(self, stale_s: float) -> None:
        self._stale_s = stale_s
        self._seen: Claim | None = None
        self._since = time.monotonic()
        self.renewed = False

    def is_dead(self, claim: Claim) -> bool:
        """Whether the run has ended, as far as is known by now."""
        if claim.owner.is_here:
            return not claim.owner.is_running
        if claim != self._seen:
            self.renewed = self._seen is not None
            self._seen, self._since = claim, time.monotonic()
        return time.monotonic() - self._since > self._stale_s


def wait_for(claims: Claims, run_dir: Path) -> None:
    """Claim the folder; UserError once another run is seen to be alive."""
    watch, start, told = Watch(claims.stale_s), time.monotonic(), False
    while not claims.take(NAME, watch.is_dead):
        found = claims.find(NAME)
        if found is None:
            continue
        waits = is_former(found) and time.monotonic() - start < FORMER_S
        if (found.owner.is_running or watch.renewed) and not waits:
            raise in_use(run_dir, found)
        if not told:
            limit = FORMER_S if waits else claims.stale_s
            print(
                f"{run_dir} was left by a run on {found.owner.host or 'another host'}: waiting "
                f"{limit:.0f} s at most to see whether that still runs",
                flush=True,
            )
        told = True
        time.sleep(LOOK_AGAIN_S)


def is_former(claim: Claim) -> bool:
    """Whether a claim is of this very Slurm job, before Slurm has started it again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return claim.job != "" and claim.job == os.environ.get("SLURM_JOB_ID") and restarts != "0"


def in_use(run_dir: Path, claim: Claim) -> UserError:
    """The error of a second run."""
    who = f"process {claim.owner.pid} on {claim.owner.host}" if claim.owner.pid else "another run"
    since = f", since {claim.since}" if claim.since else ""
    return UserError(
        f"run.dir={run_dir} is in use by {who}{since}: let that run end or stop it, or choose "
        f"another run.name"
    )


def end_at_once(run_dir: Path) -> None:
    """End this process before it writes anything more: another run has taken the folder over."""
    print(
        f"error: run.dir={run_dir} was taken over by another run while this one was stopped or "
        f"could not reach it: this one ends, and that one continues",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_ERROR)
