"""What the processor is, as far as it decides which way is the fastest on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


@cache
def mkl_is_slow() -> bool:
    """Whether this is a processor that is not Intel's, as Linux tells it: MKL, which torch asks for
    products of fp32, has its fastest kernels for Intel's, and oneDNN is twice as fast on others
    (docs/speed.md)."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


@contextmanager
def by_mkl() -> Iterator[None]:
    """MKL multiplies inside, whatever torch was told (`engine.onednn`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
