"""What fp32 means on a GPU: exact, or with the inputs of products rounded to TF32.

TF32 keeps 10 of fp32's 23 bits of mantissa and runs on tensor cores (NVIDIA Ampere and newer).
Left alone, torch uses it in cuDNN's convolutions and not in matrix products.
"""

import warnings
from typing import Any

import torch


def use_tf32(allowed: bool) -> None:
    """Let every fp32 convolution, recurrent layer and matrix product of this process use TF32 on a
    GPU, or none; whatever was set before. On the CPU fp32 is exact in either case.

    From 2.9 on torch has a flag for each kind of operation beside the old ones, and raises where
    one is read (torch.compile does) while the other says something else: so both are set.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
    backends: Any = torch.backends  # its types know the old names only
    if not hasattr(backends, "fp32_precision"):
        return
    for operation in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        operation.fp32_precision = "tf32" if allowed else "ieee"
    for operation in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn):
        operation.fp32_precision = "ieee"
