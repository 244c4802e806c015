"""`+debug=profile`: what some steps of a run spend their time on, by torch's profiler.

It watches and changes nothing: the numbers of the run are those of one that is not profiled.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from taming_dist.atomic import write_bytes
from taming_dist.cli import count
from taming_dist.engine.world import World
from taming_dist.formats.files import writing
from taming_dist.ranges import check_ranges, ranged

LISTED = 10  # operations


@dataclasses.dataclass
class ProfileConfig:
    """`steps` optimizer steps are traced, `after` so many of this start, in which kernels are
    compiled, caches filled and the profiler warms up. `every_rank`: by each rank, else by the
    first."""

    after: int = ranged(5, at_least=1)
    steps: int = ranged(3, at_least=1)
    every_rank: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "debug")


@contextmanager
def profiled(
    config: ProfileConfig | None, run_dir: Path, world: World, note: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Give what is to be called after each optimizer step of a run; without `config` it does
    nothing."""
    if config is None:
        yield lambda: None
        return
    profiler = Profiler(config, run_dir / "profile", world, note)
    yield profiler.step_done
    profiler.close()


class Operation(NamedTuple):
    """One kind of operation: how often it ran, and how long, in ms, without those that it called.

    The time is that of the GPU where it works for one, else of the CPU.
    """

    name: str
    calls: float
    ms: float


class Profiler:
    """Told of each step that is done; writes the trace and tells of the table once."""

    def __init__(
        self, config: ProfileConfig, folder: Path, world: World, note: Callable[[str], None]
    ) -> None:
        """`folder` gets rank-N.json.gz, a trace for chrome://tracing or Perfetto, and rank-N.txt;
        `note` is told of the latter."""
        self._config, self._folder, self._world, self._note = config, folder, world, note
        self._profile: profile | None = None
        self._left = 0
        if config.every_rank or world.is_first:
            activities = [ProfilerActivity.CPU]
            if world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            steps = schedule(wait=config.after - 1, warmup=1, active=config.steps, repeat=1)
            self._profile = profile(activities=activities, schedule=steps)
            self._left = config.after + config.steps
            self._profile.start()

    def step_done(self) -> None:
        """An optimizer step is over; after the last that is traced the device is waited for."""
        if self._profile is None:
            return
        self._left -= 1
        self._profile.step()
        if self._left == 0:
            self._profile.stop()
            self._tell(self._profile)
            self._profile = None

    def close(self) -> None:
        """The run ends, maybe before all was traced, of which nothing is written then."""
        if self._profile is not None:
            self._profile.stop()
            self._note(
                f"profile   none: the run has ended {count(self._left, 'step')} too early "
                f"(debug.after={self._config.after}, debug.steps={self._config.steps})"
            )
            self._profile = None

    def _tell(self, found: profile) -> None:
        name = f"rank-{self._world.rank}"
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"{name}.tmp.json.gz"
            found.export_chrome_trace(str(partial))
            os.replace(partial, self._folder / f"{name}.json.gz")
            table = listed(operations(found, self._world.device, self._config.steps))
            write_bytes(self._folder / f"{name}.txt", f"{table}\n".encode())
        self._note(f"profile   of {self._config.steps} steps, in {self._folder}\n{table}")


def operations(found: profile, device: torch.device, steps: int) -> list[Operation]:
    """What ran in a step, in the mean of those that were traced; the longest first."""
    kinds = (
        Operation(
            event.key,
            event.count / steps,
            (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
            / (1000 * steps),
        )
        for event in found.key_averages()
        if not event.key.startswith("ProfilerStep")
    )
    return sorted(kinds, key=lambda kind: -kind.ms)


def listed(kinds: Iterable[Operation]) -> str:
    """The most expensive operations as lines of text, each with its share of the time of all."""
    kinds = list(kinds)
    total = sum(kind.ms for kind in kinds) or 1.0
    lines = [f"{'ms a step':>12}{'share':>8}{'calls':>9}  operation"]
    for kind in kinds[:LISTED]:
        share = f"{kind.ms / total:.1%}"
        lines.append(f"{kind.ms:12.3f}{share:>8}{kind.calls:9.4g}  {kind.name}")
    lines.append(f"{total:12.3f}{'':>8}{'':>9}  all {len(kinds)} kinds of operations")
    return "\n".join(lines)
