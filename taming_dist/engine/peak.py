"""How many operations per second a device can do: what a run's are a share of.

That of known GPUs is their data sheet's, dense and without any boost of the clock beyond it, at the
precision of the products: bf16 and fp16 alike, TF32, or fp32. Any other device is measured by the
fastest of a few products of matrices, which draw no random numbers.
"""

import re
import time
from typing import NamedTuple

import torch

from taming_dist.engine.settings import PRECISIONS, EngineConfig
from taming_dist.engine.tf32 import EXACT

TERA = 1e12
BUDGET_S = 0.1  # for a measurement
SIDE_OF_CPU, SIDE_OF_GPU = 1024, 8192  # of the matrices


class Peaks(NamedTuple):
    """TFLOP/s of a GPU at each precision."""

    half: float
    tf32: float
    fp32: float


# by words of what torch calls it; the first that is part of the name
GPUS: dict[str, Peaks] = {
    "B200": Peaks(2250, 1125, 75),
    "GH200": Peaks(989, 495, 67),
    "H200": Peaks(989, 495, 67),
    "H100 PCIe": Peaks(756, 378, 51),
    "H100 NVL": Peaks(835, 418, 60),
    "H100": Peaks(989, 495, 67),
    "A100": Peaks(312, 156, 19.5),
    "L40S": Peaks(362, 183, 91.6),
    "L40": Peaks(181, 90.5, 90.5),
    "L4": Peaks(121, 60, 30.3),
    "A40": Peaks(150, 74.8, 37.4),
    "A10": Peaks(125, 62.5, 31.2),
    "RTX A6000": Peaks(155, 77.4, 38.7),
    "RTX 5090": Peaks(209.5, 104.8, 104.8),
    "RTX 4090": Peaks(165.2, 82.6, 82.6),
    "RTX 3090": Peaks(71, 35.6, 35.6),
}


class Peak(NamedTuple):
    """FLOP/s of one device; `known`: of its data sheet, else measured here."""

    flops: float
    known: bool


def peak_of(device: torch.device, engine: EngineConfig) -> Peak:
    """The peak of a device at the precision of the networks. (Of fp32 some products as TF32: the
    peak of TF32.)"""
    found = None
    if device.type == "cuda":
        found = known(torch.cuda.get_device_name(device), engine)
    return (
        Peak(found, True) if found else Peak(measured(device, PRECISIONS[engine.precision]), False)
    )


def known(name: str, engine: EngineConfig) -> float | None:
    """The peak of a GPU of this name, None if there is no such in the table."""
    peaks = next((found for part, found in GPUS.items() if re.search(rf"\b{part}\b", name)), None)
    if peaks is None:
        return None
    if PRECISIONS[engine.precision] is not None:
        return peaks.half * TERA
    return (peaks.fp32 if engine.allowed_tf32 == EXACT else peaks.tf32) * TERA


def measured(device: torch.device, dtype: torch.dtype | None) -> float:
    """The rate of the fastest product of square matrices on the device, with what it has of threads
    and of permission to use TF32. It ends after BUDGET_S, or one product."""
    side = SIDE_OF_GPU if device.type == "cuda" else SIDE_OF_CPU
    numbers = torch.arange(side * side, device=device, dtype=torch.float32)
    matrix = (numbers.remainder_(251).div_(251) - 0.5).view(side, side).to(dtype or torch.float32)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < BUDGET_S:
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
