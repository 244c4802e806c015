"""The same numbers to the bit each time that the same is computed on the same GPU.

On the CPU torch gives them anyway, for one number of threads. On a GPU some operations add up in
the order in which threads happen to come (index_add, the backward pass of attention), and cuDNN and
cuBLAS choose between algorithms. See docs/operations.md for what that promises and costs.
"""

import os
from typing import Any

import torch

# What cuBLAS may use as its workspace; with one of these sizes it adds up in a fixed order.
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")


def use_deterministic(wanted: bool) -> None:
    """Let this process compute with operations alone whose results are the same each time, or not;
    whatever was set before. To be called before the first matrix product on a GPU.

    An operation that has no such variant raises a RuntimeError then. What torch.compile makes is
    included from torch 2.10 on: it otherwise chooses kernels by their speed.
    """
    if wanted and os.environ.get(CUBLAS) not in FIXED:
        os.environ[CUBLAS] = FIXED[0]
    if torch.are_deterministic_algorithms_enabled() or wanted:  # imports the compiler
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = False
    # Filling each new tensor would cost time: nothing here reads what it has not written.
    memory: Any = torch.utils.deterministic  # unknown to its types
    memory.fill_uninitialized_memory = not wanted
