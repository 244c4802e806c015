"""Pairs of ranks of test_watchdog.py that lose each other: `python watchdog_worker.py FOLDER`.

The imports are done once; every rank of every scenario is a fork that writes to FOLDER/SCENARIO.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from taming_dist import cli
from taming_dist.engine import peers
from taming_dist.engine.world import World
from taming_dist.training import waits, watchdog
from taming_dist.training.clock import Clock
from taming_dist.training.ending import ending
from taming_dist.training.signals import StopRequest
from taming_dist.training.stopping import Interrupted
from taming_dist.training.watchdog import Progress, watching

Rank = Callable[[World, Progress], None]


def compute(world: World, progress: Progress) -> None:
    """What a rank does that waits for the other."""
    for _ in range(3):
        progress.begin("in the step")
        world.sum(torch.ones(()))
        progress.steps += 1
    progress.begin("in the step")
    world.sum(torch.ones(()))


def then(end: Callable[[Progress], None]) -> Rank:
    """A rank that does something else in the end."""

    def rank(world: World, progress: Progress) -> None:
        for _ in range(3):
            world.sum(torch.ones(()))
            progress.steps += 1
        end(progress)

    return rank


def sleep(progress: Progress) -> None:
    """As NCCL does: it waits for a rank that is gone, without an error."""
    progress.begin("in the step")
    time.sleep(300)


def read(progress: Progress) -> None:
    """Wait for data from a process that is stopped."""
    child = subprocess.Popen(["sleep", "300"], stdout=subprocess.PIPE)
    os.kill(child.pid, signal.SIGSTOP)
    Path("child").write_text(str(child.pid))
    assert child.stdout is not None
    progress.begin("waiting for data")
    child.stdout.read()


def wait(progress: Progress) -> None:
    """Wait for a batch that does not come, until all ranks have left such a wait."""
    try:
        with progress.waiting("waiting for data", "step 3"):
            time.sleep(300)
    except Interrupted:
        progress.begin("saving")


def send(number: signal.Signals) -> Callable[[Progress], None]:
    return lambda progress: os.kill(os.getpid(), number)


def refuse(progress: Progress) -> None:
    raise cli.UserError("no file a")


# scenario -> what the ranks do, and whether they are on two hosts
SCENARIOS: dict[str, tuple[Rank, Rank, bool]] = {
    "fine": (compute, compute, False),
    "killed": (compute, then(send(signal.SIGKILL)), False),
    "killed-unnoticed": (then(sleep), then(send(signal.SIGKILL)), False),
    "failed-unnoticed": (then(sleep), then(refuse), False),
    "stopped": (compute, then(send(signal.SIGSTOP)), False),
    "reading": (compute, then(read), False),
    "left": (then(wait), then(wait), False),
    "left-alone": (compute, then(wait), False),
    "far-killed": (compute, then(send(signal.SIGKILL)), True),
    "far-killed-unnoticed": (then(sleep), then(send(signal.SIGKILL)), True),
    "far-store-killed": (then(send(signal.SIGKILL)), then(sleep), True),
    "far-store-stopped": (then(send(signal.SIGSTOP)), compute, True),
}
AT_ONCE = 3  # scenarios: their limits are seconds, which two cores must not run out of
WITHOUT_LIMIT = (
    "left",
    "left-alone",
    "killed-unnoticed",
    "failed-unnoticed",
    "far-killed-unnoticed",
    "far-store-killed",
)


def run(scenario: str, rank: int, port: int) -> None:
    """One rank, in a folder of its own scenario."""
    own, distinct = SCENARIOS[scenario][rank], SCENARIOS[scenario][2]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watchdog.GRACE_S, watchdog.FIRST_TO_SPEAK_S = 3.0, 2.0
    peers.SILENT_S, peers.SUSPECT_S, peers.ANSWER_S = 4.0, 2.0, 2.0
    if distinct:
        socket.gethostname = lambda: "ab"[rank]
    watchdog.PATIENCE_S, waits.TOGETHER_S = 1.0, 3.0
    stop = StopRequest()
    stop.name = "SIGTERM" if scenario.startswith("left") and rank == 1 else None
    limit = 0.0 if scenario in WITHOUT_LIMIT else 4.0
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    world, clock = World(rank, 2, rank, torch.device("cpu")), Clock(1, 10)
    here = Path(".")
    with (
        cli.one_line(),
        ending(here, world, clock),
        watching(here, world, clock, limit, stop) as told,
    ):
        own(world, told)


def start(scenario: str, rank: int, port: int) -> int:
    """The process id of a rank; a fork."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{rank}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        run(scenario, rank, port)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end(process: int) -> int:
    """The code with which a rank ends, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def play(folder: Path, names: Sequence[str]) -> None:
    """Run scenarios side by side, and note the codes with which their ranks end."""
    ranks: dict[str, list[int]] = {}
    for name in names:
        meeting = free_port()
        (folder / name).mkdir(parents=True)
        os.chdir(folder / name)
        ranks[name] = [start(name, rank, meeting) for rank in range(2)]
    for name, pair in ranks.items():
        survivor = 1 if name.startswith("far-store") else 0
        codes = {survivor: end(pair[survivor])}
        if "stopped" in name:
            os.kill(pair[1 - survivor], signal.SIGKILL)
        codes[1 - survivor] = end(pair[1 - survivor])
        (folder / name / "codes").write_text(f"{codes[0]} {codes[1]}")


if __name__ == "__main__":
    everything = sys.argv[2:] or list(SCENARIOS)
    for at in range(0, len(everything), AT_ONCE):
        play(Path(sys.argv[1]), everything[at : at + AT_ONCE])
