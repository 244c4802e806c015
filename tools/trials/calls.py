"""Ranks that are killed at each of their calls of the file system, one after the other."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from trials.cutting import Call, Cut
from trials.group import Group, Shape
from trials.killing import ALONE_S, GRACE_S, LONGEST_S, LOOK_S, Broken, finish


def calls_of(run_dir: Path, shape: Shape, arguments: Sequence[str]) -> list[list[Call]]:
    """Train undisturbed; gives each rank's calls that concern its folder, in order.

    Raises:
        Broken: it did not get to its end.
    """
    files = [run_dir.with_name(f"{run_dir.name}-calls-{rank}") for rank in range(shape.ranks)]
    finish(Group(run_dir, shape, arguments, 0, lambda rank: record_calls(run_dir, files[rank])))
    return [[Call(*json.loads(line)) for line in file.read_text().splitlines()] for file in files]


def record_calls(run_dir: Path, file: Path) -> None:
    """Have this process write down its calls."""
    record = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)

    def noted(call: Call) -> bool:
        os.write(record, f"{json.dumps(call, allow_nan=False)}\n".encode())
        return False

    Cut(run_dir, noted, setattr, die)


def die() -> None:
    """Be killed, as by the system."""
    os.kill(os.getpid(), signal.SIGKILL)


def cutter(run_dir: Path, victim: int, last: Call) -> Callable[[int], None]:
    """What has one rank die at a call."""

    def before(rank: int) -> None:
        if rank == victim:
            Cut(run_dir, lambda call: call == last, setattr, die)

    return before


def run_cut(
    run_dir: Path, shape: Shape, arguments: Sequence[str], victim: int, last: Call, told: bool
) -> bool:
    """Train until one rank dies at a call, and start again for the rest; False if the call did not
    come. `told`: the other ranks are then asked to end, as torchrun does it; else they are killed
    at the same moment, as if their node were gone.

    Raises:
        Broken: a start did not end as it should have.
    """
    group = Group(run_dir, shape, arguments, 0, cutter(run_dir, victim, last))
    try:
        is_cut = wait_for_death(group, victim)
        if is_cut and shape.ranks > 1:
            group.kill(None, signal.SIGTERM if told else signal.SIGKILL)
        if not group.wait(GRACE_S) and not told and not group.wait(ALONE_S):
            raise Broken(f"{run_dir}: ranks outlived a lost one at {last}\n{group.output}")
    finally:
        group.kill(None)
        group.wait(GRACE_S)
    finish(Group(run_dir, shape, arguments, 1))
    return is_cut


def wait_for_death(group: Group, victim: int) -> bool:
    """Wait until a rank has been killed; False if the run came to its end."""
    deadline = time.monotonic() + LONGEST_S
    while not group.poll() and victim not in group.statuses:
        if time.monotonic() > deadline:
            raise Broken(f"{group.run_dir}: neither cut nor at its end\n{group.output}")
        time.sleep(LOOK_S)
    return group.statuses[victim] == -signal.SIGKILL


def sampled(calls: list[list[Call]], most: int, chance: random.Random) -> list[tuple[int, Call]]:
    """At most so many of all ranks' calls (0: all), each with its rank. All kinds come once, rank,
    name and file, before any comes twice."""
    every = [(rank, call) for rank, own in enumerate(calls) for call in own]
    if most == 0:
        return every
    chance.shuffle(every)
    turns: Counter[tuple[int, str, str]] = Counter()
    ranked = []
    for rank, call in every:
        ranked.append((turns[rank, call.name, call.file], rank, call))
        turns[rank, call.name, call.file] += 1
    ranked.sort(key=lambda entry: entry[0])
    return [(rank, call) for _, rank, call in ranked[:most]]
