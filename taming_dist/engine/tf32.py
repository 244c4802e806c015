"""What fp32 means: exact, or on a GPU with the inputs of some operations rounded to TF32.

TF32 keeps 10 of fp32's 23 bits of mantissa and runs on tensor cores (NVIDIA Ampere and newer).
Left alone, torch uses it in cuDNN's convolutions and not in matrix products. Without a GPU there is
a choice of libraries, which are all exact (`engine.onednn`).
"""

import dataclasses
import warnings
from typing import Any

import torch

from taming_dist.engine import onednn


@dataclasses.dataclass(frozen=True)
class TF32:
    """Which fp32 operations of a process may use TF32."""

    convolutions: bool
    products: bool


EXACT = TF32(convolutions=False, products=False)
TF32_CHOICES = {
    "none": EXACT,
    "convolutions": TF32(convolutions=True, products=False),
    "all": TF32(convolutions=True, products=True),
}


def use_tf32(allowed: TF32) -> None:
    """Let the fp32 convolutions (and recurrent layers) and matrix products of this process use
    TF32 on a GPU, or not; whatever was set before. On the CPU fp32 is exact in any case, its
    products by the faster library.

    From 2.9 on torch has a flag for each kind of operation beside the old ones, and raises where
    one is read (torch.compile does) while the other says something else: so both are set.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        products = "high" if allowed.products else onednn.EXACT
        if not torch.cuda.is_available() and onednn.multiplies():
            products = onednn.MAY_ROUND
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = allowed.convolutions
    backends: Any = torch.backends  # its types know the old names only
    if not hasattr(backends, "fp32_precision"):
        return
    # (also without a GPU, where nothing reads it but torch's check that its flags agree)
    backends.cuda.matmul.fp32_precision = "ieee" if products == onednn.EXACT else "tf32"
    for operation in (backends.cudnn.conv, backends.cudnn.rnn):
        operation.fp32_precision = "tf32" if allowed.convolutions else "ieee"
    for operation in (backends.mkldnn.conv, backends.mkldnn.rnn):
        operation.fp32_precision = "ieee"
    backends.mkldnn.matmul.fp32_precision = "bf16" if products == onednn.MAY_ROUND else "ieee"
