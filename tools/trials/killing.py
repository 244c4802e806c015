"""Ranks that are killed at random moments, many of them while something is being saved."""

import json
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from taming_dist.engine.finding import newest_valid
from taming_dist.engine.meta import read_meta
from trials.group import Group, Shape
from trials.training import SAVED_EVERY

LOOK_S = 0.002
LONGEST_S = 300.0  # that a start may take
GRACE_S = 10.0  # that ranks have to end once the launcher has asked them; torchrun gives them 30 s
ALONE_S = 90.0  # that ranks may need to end by themselves after one is lost
UNFINISHED = ("checkpoints/images-*.tmp", ".export-*")  # folders that are there while a save is


@dataclass(frozen=True)
class Kill:
    """What is to happen to a start.

    `when`: "start", `delay` seconds after its beginning; "step", so long after `steps` of its
    steps; "save", so long after the `steps`-th folder of a save has appeared. `victim`: a rank;
    None: all at once. `told`: the other ranks are then sent SIGTERM, and killed if that does not
    end them, as torchrun does it; else they have to find out.
    """

    when: str
    steps: int
    delay: float
    victim: int | None
    told: bool


@dataclass
class Start:
    """What became of a start. `done`: the last step that was logged when it was killed; `saved`:
    that of the newest checkpoint; `outlived_s`: how long ranks that nobody told needed to end."""

    shape: Shape
    kill: Kill | None
    is_saving: bool = False
    done: int = 0
    saved: int = 0
    outlived_s: float = 0.0

    @property
    def lost(self) -> int:
        """Steps to be made again."""
        return max(0, self.done - self.saved)


@dataclass
class Disturbed:
    """A run that was killed and started until it was finished."""

    run_dir: Path
    starts: list[Start] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def kills(self) -> list[Start]:
        return [start for start in self.starts if start.kill is not None]


class Broken(Exception):
    """A start did not end as it should have; the message says how."""


def random_kill(chance: random.Random, ranks: int) -> Kill:
    """Half of the kills strike in a save, two fifths between steps, a tenth before the first."""
    when = chance.choices(("save", "step", "start"), (5, 4, 1))[0]
    longest = {"save": 0.25, "step": 0.3, "start": 2.0}[when]
    victim = chance.choice([None, chance.randrange(ranks)]) if ranks > 1 else None
    # before the ranks have met nobody but a launcher can know that one of them is gone
    told = when == "start" or chance.random() < 0.5
    steps = chance.randint(1, 2 * SAVED_EVERY if when == "step" else 3)
    return Kill(when, steps, chance.uniform(0, longest), victim, told)


def run_undisturbed(run_dir: Path, shape: Shape, arguments: Sequence[str]) -> None:
    """Train to the end in one go.

    Raises:
        Broken: it did not get there.
    """
    group = Group(run_dir, shape, arguments, 0)
    finish(group)


def finish(group: Group) -> None:
    """Wait until the ranks have finished the run; Broken if they do not."""
    ended = group.wait(LONGEST_S)
    group.kill(None)
    group.wait(GRACE_S)
    if not ended:
        raise Broken(f"{group.run_dir}: not at its end after {LONGEST_S:.0f} s\n{group.output}")
    if any(group.statuses.values()) or not is_finished(group):
        raise Broken(f"{group.run_dir}: a start that nobody disturbed failed\n{group.output}")


def is_finished(group: Group) -> bool:
    """Whether the run has told that it is."""
    return group.outcome.is_file() and json.loads(group.outcome.read_text())["finished"]


def run_disturbed(
    run_dir: Path,
    shapes: Sequence[Shape],
    arguments: Sequence[str],
    kills: int,
    chance: random.Random,
) -> Disturbed:
    """Start, kill, and start again until so many kills are made or the run is finished, which at
    last it is left to be. Each start has one of the `shapes`.

    Raises:
        Broken: a start failed by itself, or ranks outlived one that was lost.
    """
    found = Disturbed(run_dir)
    began = time.monotonic()
    is_over = False
    while not is_over:
        shape = chance.choice(shapes)
        left = kills - len(found.kills)
        start = Start(shape, random_kill(chance, shape.ranks) if left > 0 else None)
        group = Group(run_dir, shape, arguments, len(found.starts))
        try:
            if start.kill is None or not strike(group, start, start.kill):
                start.kill = None
                finish(group)
                is_over = True
        finally:
            group.kill(None)
            group.wait(GRACE_S)
        found.starts.append(start)
    found.wall_s = time.monotonic() - began
    return found


def strike(group: Group, start: Start, kill: Kill) -> bool:
    """Kill when the moment has come, and wait until all ranks have ended; False where the run was
    at its end before that.

    Raises:
        Broken: ranks did not end in time.
    """
    began = time.monotonic()
    for has_come in moments(group.run_dir, kill):
        if group.poll():
            return False
        if has_come:
            break
        if time.monotonic() - began > LONGEST_S:
            raise Broken(f"{group.run_dir}: {kill} found no moment to strike\n{group.output}")
        time.sleep(LOOK_S)
    start.is_saving = bool(unfinished(group.run_dir))
    group.kill(kill.victim)
    struck = time.monotonic()
    start.done = last_step(group.run_dir)
    if kill.told:
        group.kill(None, signal.SIGTERM)
        if not group.wait(GRACE_S):
            group.kill(None)
    if not group.wait(ALONE_S):
        raise Broken(f"{group.run_dir}: ranks outlived a lost one, {kill}\n{group.output}")
    start.saved = step_saved(group.run_dir)
    start.outlived_s = 0.0 if kill.told else time.monotonic() - struck
    return True


def moments(run_dir: Path, kill: Kill) -> Iterator[bool]:
    """Whether the moment of a kill has come, for ever."""
    former, first = unfinished(run_dir), last_line(run_dir / "metrics.jsonl")
    seen: set[tuple[str, int]] = set()
    began = time.monotonic() if kill.when == "start" else None
    while True:
        if began is not None:
            yield time.monotonic() - began >= kill.delay
            continue
        if kill.when == "save":
            seen |= unfinished(run_dir) - former
            came = len(seen) >= kill.steps
        else:
            line = last_line(run_dir / "metrics.jsonl")
            seen |= {(line, 0)} if line != first else set()
            came = len(seen) >= kill.steps
        began = time.monotonic() if came else None
        yield False


def unfinished(run_dir: Path) -> set[tuple[str, int]]:
    """The folders of saves that are being written, or that a killed run has left."""
    found = set()
    for pattern in UNFINISHED:
        for path in run_dir.glob(pattern):
            try:
                found.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
    return found


def last_line(file: Path) -> str:
    """The last whole line of a file."""
    whole = file.read_text().split("\n")[:-1] if file.is_file() else []
    return whole[-1] if whole else ""


def last_step(run_dir: Path) -> int:
    """The last step that the run has logged."""
    line = last_line(run_dir / "metrics.jsonl")
    return json.loads(line)["step"] if line else 0


def step_saved(run_dir: Path) -> int:
    """The step of the newest whole checkpoint: the next start resumes there."""
    found = newest_valid(run_dir / "checkpoints", report=lambda _: None)
    return read_meta(found).step if found else 0
