"""What a disturbed run has cost."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trials.comparing import lines
from trials.killing import Disturbed


@dataclass(frozen=True)
class Figures:
    """Of one or more disturbed runs.

    `lost`: steps made again, by kill. `productive_s`: the time of the steps that count (from one
    line of metrics.jsonl to the next of the same start), of `wall_s`. `outlived_s`: how long
    ranks that nobody told needed to end after one was lost, at most. `stalls_s`, `saves_s`: see the
    event `save`.
    """

    kills: int
    saving: int
    starts: int
    lost: tuple[int, ...]
    productive_s: float
    wall_s: float
    outlived_s: float
    stalls_s: tuple[float, ...]
    saves_s: tuple[float, ...]

    @property
    def goodput(self) -> float:
        """The part of the time in which steps were made that count."""
        return self.productive_s / self.wall_s


def figures_of(run: Disturbed) -> Figures:
    """The figures of a run that is finished."""
    events = lines(run.run_dir / "events.jsonl")
    saves = [event for event in events if event["event"] == "save"]
    return Figures(
        kills=len(run.kills),
        saving=sum(start.is_saving for start in run.kills),
        starts=len(run.starts),
        lost=tuple(start.lost for start in run.kills),
        productive_s=productive(run),
        wall_s=run.wall_s,
        outlived_s=max((start.outlived_s for start in run.kills), default=0.0),
        stalls_s=tuple(save["stall_s"] for save in saves),
        saves_s=tuple(save["duration_s"] for save in saves),
    )


def productive(run: Disturbed) -> float:
    """Seconds between neighbouring lines of metrics.jsonl between which there was no start."""
    logged = [line["time"] for line in lines(run.run_dir / "metrics.jsonl")]
    events = lines(run.run_dir / "events.jsonl")
    begun = [event["time"] for event in events if event["event"] in ("start", "resume")]
    pairs = zip(logged, logged[1:], strict=False)
    return sum(
        after - before
        for before, after in pairs
        if not any(before < time < after for time in begun)
    )


def together(all_figures: Sequence[Figures]) -> Figures:
    """Those of several runs as if they were one."""
    return Figures(
        kills=sum(one.kills for one in all_figures),
        saving=sum(one.saving for one in all_figures),
        starts=sum(one.starts for one in all_figures),
        lost=sum((one.lost for one in all_figures), ()),
        productive_s=sum(one.productive_s for one in all_figures),
        wall_s=sum(one.wall_s for one in all_figures),
        outlived_s=max(one.outlived_s for one in all_figures),
        stalls_s=sum((one.stalls_s for one in all_figures), ()),
        saves_s=sum((one.saves_s for one in all_figures), ()),
    )


HEADER = (
    f"{'':20} {'kills':>5} {'saving':>6} {'starts':>6} {'lost: mean':>10} {'most':>4} "
    f"{'goodput':>7} {'stall, ms':>9} {'save, ms':>8} {'survivors, s':>12}"
)


def row(name: str, of: Figures) -> str:
    """A line of the table; stalls and saves by their medians."""
    stall, save = (1000 * statistics.median(times) for times in (of.stalls_s, of.saves_s))
    lost = of.lost or (0,)
    return (
        f"{name:20} {of.kills:5} {of.saving:6} {of.starts:6} {statistics.mean(lost):10.1f} "
        f"{max(lost):4} {of.goodput:7.0%} {stall:9.0f} {save:8.0f} {of.outlived_s:12.1f}"
    )
