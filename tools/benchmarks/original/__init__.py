"""The arithmetic of the original implementation in plain PyTorch: what speeds are compared with.

Written for the purpose from what is known of it (arXiv 2012.09841 and the defaults of its code):
the same operations in the same order and as often, the ones that are thrown away included, without
the framework, the logging and the loaders around them. Modules have the parameter names and shapes
of this package's models, whose weights they take: tests/tools/test_benchmark_original.py shows that
both compute the same.
"""

import torch

from benchmarks.original.stage1 import LPIPS, VQGAN, Stage1, nearest, patchgan
from benchmarks.original.stage2 import GPT, Stage2

__all__ = ["GPT", "LPIPS", "VQGAN", "Stage1", "Stage2", "as_torch_is", "nearest", "patchgan"]


def as_torch_is() -> None:
    """Have the CPU multiply by the library that torch takes where it is told nothing, as the
    original does (not so `taming_dist.engine.onednn`)."""
    torch.set_float32_matmul_precision("highest")
