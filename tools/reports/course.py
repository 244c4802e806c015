"""What a run went through and what it took: starts, goodput, skipped steps, speed, device-hours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from reports.html import cells, plain, table
from reports.reading import RUNNING, UTILIZATION, RunRecord, number
from taming_dist.cli import count

GOODPUT = "throughput/goodput"
TOO_LOW = "not known: the peak was measured on a busy machine"


@dataclass(frozen=True)
class Start:
    """One start of a run: on how many `ranks` of what `device` (None: not logged), and for how many
    `seconds` it ran, up to the last line that it wrote."""

    ranks: float | None
    device: str | None
    seconds: float


def starts(run: RunRecord) -> list[Start]:
    """The starts of a run in their order. Each tells how long those before it ran."""
    told = [event for event in run.events if event.get("event") in ("start", "resume")]
    if not told:
        return []
    began = [number(event.get("running_s")) or 0.0 for event in told]
    ends = [*began[1:], max(began[-1], running(run))]
    return [
        Start(number(event.get("ranks")), event.get("device"), max(0.0, end - begin))
        for event, begin, end in zip(told, began, ends, strict=True)
    ]


def running(run: RunRecord) -> float:
    """Seconds that the processes of a run ran, over all of its starts."""
    found = [row.get(RUNNING) for row in run.rows]
    found += [event.get("running_s") for event in run.events]
    return max((value for value in map(number, found) if value is not None), default=0.0)


def device_hours(run: RunRecord) -> float | None:
    """Devices times hours, over all starts; None if one has not told how many devices it had."""
    found = starts(run)
    hours = 0.0
    for start in found:
        if start.ranks is None:
            return None
        hours += start.ranks * start.seconds / 3600
    return hours if found else None


def goodput(run: RunRecord) -> float | None:
    """The share of the running time that went into steps that were kept, as last told."""
    told = [(row.get(RUNNING), row.get(GOODPUT)) for row in run.rows]
    told += [(event.get("running_s"), event.get("goodput")) for event in run.events]
    known = [
        (seconds, share)
        for seconds, share in told
        if number(seconds) is not None and number(share) is not None
    ]
    return max(known)[1] if known else None


def ending(run: RunRecord) -> str:
    """How the newest start has ended."""
    told = [event for event in run.events if event.get("event") in ("start", "resume", "exit")]
    if not told or told[-1]["event"] != "exit":
        return "no end logged: it runs, or was killed"
    return str(told[-1].get("reason") or "no reason given")


def best(run: RunRecord) -> dict[str, Any] | None:
    """The newest `best` event."""
    told = (event for event in reversed(run.events) if event.get("event") == "best")
    whole = (event for event in told if isinstance(event.get("metric"), str))
    return next((event for event in whole if number(event.get("value")) is not None), None)


def skips(run: RunRecord) -> tuple[int, int]:
    """How many steps were skipped, and how many samples with them."""
    # a run that was sent back to an earlier step has skipped the same one again
    found = {event["samples"]: event for event in run.events if event.get("event") == "skip"}
    keys = (event.get("keys") for event in found.values())
    return len(found), sum(len(each) for each in keys if isinstance(each, list))


def saves(run: RunRecord) -> list[float]:
    """The seconds for which each save has stopped training."""
    told = (event.get("stall_s") for event in run.events if event.get("event") == "save")
    return [stall for stall in map(number, told) if stall is not None]


def mean_of(run: RunRecord, name: str) -> float | None:
    """The mean of a metric over all log points."""
    found = values_of(run, name)
    return fmean(found) if found else None


def values_of(run: RunRecord, name: str) -> list[float]:
    """A metric at each log point that has it."""
    return [value for row in run.rows if (value := number(row.get(name))) is not None]


def facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    """What the page says of a run's course: labels with text, empty where nothing is known."""
    end = run.timeline
    yield "End", ending(run)
    top = best(run)
    yield (
        "Best validation",
        (f"{top['metric']} {top['value']:.4g} after {top['samples']:,} images" if top else ""),
    )
    yield "Images seen", f"{int(end.images[-1]):,}"
    yield "Optimizer steps", f"{round(end.steps[-1]):,}"
    seconds = running(run)
    yield "Hours, over all starts", plain(seconds / 3600) if seconds else ""
    yield "Devices", devices(run)
    cost = device_hours(run)
    yield "Cost, device-hours", "not logged" if cost is None else plain(cost)
    kept = goodput(run)
    yield "Goodput", "" if kept is None else f"{kept:.1%}"
    yield "Restarts", str(max(0, len(starts(run)) - 1))
    steps, samples = skips(run)
    yield "Skipped steps", f"{steps}" + (f" (with {count(samples, 'sample')})" if samples else "")
    stalls = saves(run)
    yield "Saves", f"{len(stalls)}" + (f" (median stall {median(stalls):.2g} s)" if stalls else "")
    rates = values_of(run, "throughput/images_per_s")
    yield "Images per second, median", plain(median(rates)) if rates else ""
    used = values_of(run, UTILIZATION)
    share = f"{median(used):.1%}" if used else ""
    yield "Model FLOPs utilization, median", TOO_LOW if run.peak_is_wrong else share
    waits = mean_of(run, "throughput/data_wait_fraction")
    yield "Waits for data, mean share", "" if waits is None else f"{waits:.1%}"
    peak = values_of(run, "throughput/memory_peak_gib")
    yield "Peak of memory, GiB", plain(max(peak)) if peak else ""


def devices(run: RunRecord) -> str:
    """The devices of each start, those alike in a row once."""
    told = [
        f"{start.ranks:g} x {start.device or 'unknown device'}" if start.ranks else "not logged"
        for start in starts(run)
    ]
    return ", then ".join(told[:1] + [now for before, now in pairwise(told) if before != now])


def course_table(runs: Sequence[RunRecord]) -> str:
    """The courses of runs side by side; what no run knows is left out."""
    columns = [dict(facts(run)) for run in runs]
    rows = [
        cells(label, zip(runs, (column[label] for column in columns), strict=True))
        for label in columns[0]
        if any(column[label] for column in columns)
    ]
    note = (
        "<p>Goodput: the share of the running time that went into steps that were kept. "
        "Device-hours: ranks (one GPU each, on GPUs) times hours, summed over all starts, each up "
        "to the last line that it wrote.</p>"
    )
    return note + table("Course and cost of the runs", runs, rows)
