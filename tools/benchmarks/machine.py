"""The machine at hand: what it is, and the peaks that it reaches, measured.

A peak is the best of some calls of one operation that does nothing else: a product of large square
matrices, a 3x3 convolution of 128 channels in the better of its two layouts, a copy.
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from torch.nn import functional as F

from benchmarks.timing import seconds_of
from taming_dist.engine.tf32 import EXACT, TF32_CHOICES, use_tf32

PACKAGES = ("torch", "deepspeed", "triton", "numpy")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SIDE = {"cpu": 2048, "cuda": 8192}
IMAGES = {"cpu": (2, 128, 128, 128), "cuda": (16, 128, 256, 256)}
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes
CALLS = 5
COPY = "copy"


@dataclasses.dataclass(frozen=True)
class Machine:
    """`peaks` in GFLOP/s by `operation precision`; `copy` in GB/s, reading and writing added."""

    device: str
    cpu: str
    cores: int
    threads: int
    memory_gb: float
    versions: dict[str, str]
    peaks: dict[str, float]


def describe(device: torch.device, peaks: dict[str, float]) -> Machine:
    """The machine with these peaks."""
    cuda = device.type == "cuda"
    return Machine(
        torch.cuda.get_device_name(device) if cuda else "CPU",
        cpu_name(),
        psutil.cpu_count() or 1,
        torch.get_num_threads(),
        round(psutil.virtual_memory().total / 1e9, 1),
        dict(versions()),
        peaks,
    )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_name() -> str:
    """As Linux has it, which says more than `platform`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def measured_peaks(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """The peaks of the machine, as `Machine.peaks` has them."""
    found = {COPY: copy_rate(device) / 1e9}
    for precision in precisions:
        use_tf32(TF32_CHOICES["all"] if precision == "tf32" else EXACT)
        found[f"gemm {precision}"] = gemm_rate(device, DTYPES[precision]) / 1e9
        found[f"conv {precision}"] = convolution_rate(device, DTYPES[precision]) / 1e9
    return found


def better(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of each peak."""
    return {name: max(value, other.get(name, 0.0)) for name, value in one.items()}


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED[device.type] / best(lambda: target.copy_(source), device)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a product of square matrices."""
    side = SIDE[device.type]
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best(lambda: one @ other, device)


@torch.no_grad()
def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a 3x3 convolution that keeps the number of channels."""
    b, c, h, w = IMAGES[device.type]
    rates = []
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(b, c, h, w, device=device).to(dtype, memory_format=layout)
        weight = torch.randn(c, c, 3, 3, device=device).to(dtype, memory_format=layout)
        seconds = best(lambda x=images, y=weight: F.conv2d(x, y, padding=1), device)
        rates.append(2 * b * c * c * 9 * h * w / seconds)
    return max(rates)


def best(work: object, device: torch.device) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    assert callable(work)
    work()
    return min(seconds_of(work, device).wall for _ in range(CALLS))
