"""Which library multiplies matrices of fp32 on the CPU: MKL, or oneDNN where MKL is slow.

torch asks oneDNN only where it is told that products may be rounded to bf16. What rounds are units
for products of bf16 (AMX); a processor without them has oneDNN compute in fp32. So torch is told so
where MKL is slow, and only if a product shows that nothing is rounded.
"""

from functools import cache

import torch

from taming_dist.kernels.processor import mkl_is_slow

EXACT, MAY_ROUND = "highest", "medium"  # as torch.set_float32_matmul_precision calls them
SIDE, SMALL = 256, 2.0**-12  # 1 + SMALL is 1 in bf16 and in TF32, and sums of SIDE fit into fp32


def multiplies() -> bool:
    """Whether torch is to be told MAY_ROUND, for exact products by oneDNN. The first time this
    tries two, and leaves torch at EXACT."""
    return mkl_is_slow() and _nothing_is_rounded()


@cache
def _nothing_is_rounded() -> bool:
    """Whether products, single and batched, keep all bits of their factors though they need not."""
    factor = torch.full((2, SIDE, SIDE), 1 + SMALL)
    ones = torch.ones_like(factor)
    torch.set_float32_matmul_precision(MAY_ROUND)
    try:
        products = factor[0] @ ones[0], factor @ ones
    finally:
        torch.set_float32_matmul_precision(EXACT)
    return all(bool((each == SIDE * (1 + SMALL)).all()) for each in products)
