"""Forms of the same work by turns: how long each takes, and the memory that it needs."""

import ctypes
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

LEAST_S = 0.2  # a sample lasts so long at least: short calls are repeated
MOST_CALLS = 50
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of one call, and of the processor for it, all threads of this process together."""

    wall: float
    cpu: float


def seconds_of(work: Callable[[], Any], device: torch.device, calls: int = 1) -> Sample:
    """The mean over some calls, until the device has done them."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = time.process_time()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        cpu = time.process_time() - cpu
        torch.cuda.synchronize(device)
        return Sample(begin.elapsed_time(end) / 1e3 / calls, cpu / calls)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    return Sample((time.perf_counter() - start) / calls, (time.process_time() - cpu) / calls)


def by_turns(
    forms: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[Sample]]:
    """A sample of each form in each round, in the reverse order in every second one, so that what
    else happens on the machine meets all alike. All have run before: nothing is warmed up here."""
    calls = {}
    for name, work in forms.items():
        once = seconds_of(work, device).wall
        calls[name] = min(MOST_CALLS, max(1, math.ceil(LEAST_S / max(once, 1e-9))))
    samples: dict[str, list[Sample]] = {name: [] for name in forms}
    for number in range(rounds):
        for name in list(forms)[:: -1 if number % 2 else 1]:
            samples[name].append(seconds_of(forms[name], device, calls[name]))
    return samples


def ratio(ours: list[Sample], original: list[Sample]) -> float:
    """How many times as fast ours is: the median over rounds of two samples side by side."""
    pairs = zip(ours, original, strict=True)
    return statistics.median(other.wall / own.wall for own, other in pairs)


def quartiles(samples: list[Sample]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the seconds."""
    walls = [sample.wall for sample in samples]
    if len(walls) == 1:
        return walls[0], walls[0], walls[0]
    low, median, high = statistics.quantiles(walls, n=4, method="inclusive")
    return low, median, high


class PeakMemory:
    """The most memory that is held on the device while it is watched, above what was held before.

    On the CPU that of this process, as Linux counts it: what was freed before goes back to the
    system first; None where that is not to be had.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before: float | None = torch.cuda.memory_allocated(device)
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._before = resident("VmRSS") if forget_peak() else None

    def read(self) -> float | None:
        """Bytes up to now."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return resident("VmHWM") - self._before


def forget_peak() -> bool:
    """Have Linux begin anew with this process' largest resident set; False: it cannot."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def resident(name: str) -> float:
    """Bytes of a line of this process' status."""
    return 1024.0 * int(STATUS.read_text().partition(f"{name}:")[2].split()[0])
