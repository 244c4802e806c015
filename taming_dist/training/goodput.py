"""How much of a run's time went into steps that count, over all of its starts.

Log points have it, so that what a killed start has trained in vain goes with their lines: a resumed
run takes what was trained until its checkpoint from the lines that are kept, and for how long it
has run from all of them. Nothing of it is in a checkpoint, whose bytes tell no time.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming_dist.cli import count
from taming_dist.formats.strict_json import json_lines

GOODPUT, RUNNING = "throughput/goodput", "throughput/running_s"


@dataclass(frozen=True)
class Goodput:
    """`trained_s`: seconds in steps that were kept, without waits for data; `running_s`: those that
    processes ran; `since_s`: those since the first start; `restarts`: how many followed it."""

    trained_s: float
    running_s: float
    since_s: float
    restarts: int

    @property
    def share(self) -> float:
        """The share of the time that it ran."""
        return self.trained_s / self.running_s if self.running_s > 0 else 0.0

    def __str__(self) -> str:
        of_all = self.trained_s / self.since_s if self.since_s > 0 else 0.0
        return (
            f"goodput {self.share:.1%} of the {self.running_s:.0f} s that it ran, {of_all:.1%} of "
            f"the {self.since_s:.0f} s since its first start, {count(self.restarts, 'restart')}"
        )


@dataclass(frozen=True)
class Past:
    """What the starts before this one have left: see `Goodput`; `first`: Unix time."""

    trained_s: float
    running_s: float
    first: float
    starts: int

    def until_now(self, trained_s: float, began: float) -> Goodput:
        """With what this start has trained, which `began` at that time.monotonic()."""
        running_s = self.running_s + time.monotonic() - began
        since_s = max(time.time() - self.first, running_s)  # clocks may be set back
        return Goodput(self.trained_s + trained_s, running_s, since_s, self.starts)


def read_past(run_dir: Path | None, images: int) -> Past:
    """What earlier starts of a run have left that is resumed at so many images, before its metrics
    are rewound to them; nothing on ranks that have no files (None)."""
    if run_dir is None:
        return Past(0.0, 0.0, time.time(), 0)
    trained_s = running_s = 0.0
    for line in lines(run_dir / "metrics.jsonl"):
        if GOODPUT in line and RUNNING in line:
            running_s = max(running_s, line[RUNNING])
            if line["samples"] <= images:
                trained_s = line[GOODPUT] * line[RUNNING]
    first, starts = None, 0
    for event in lines(run_dir / "events.jsonl"):
        first = event.get("time") if first is None else first
        starts += event.get("event") in ("start", "resume")
        running_s = max(running_s, event.get("running_s", 0.0))
    return Past(trained_s, running_s, time.time() if first is None else first, starts)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines, if there is one."""
    if not path.is_file():
        return
    for _, values in json_lines(path):
        if values is not None:
            yield values
