"""The nearest code of every vector, without the matrix of distances.

The plain form (`models.quantizers.interface.nearest`) writes N x K distances and reads them again;
here a program keeps those of its rows to one block of codes, and of each row only the best so far.
The limit is then the matrix product, or for few dimensions the comparisons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CODES, DEPTH = 64, 128, 32  # of a block of distances, and dimensions per product
LEAST = 16  # that `tl.dot` takes of each
WARPS = 4


@triton.jit
def _nearest_kernel(
    Z, ENTRIES, SQUARED, OUT, rows, codes, dim,
    ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    best = tl.full([ROWS], float("inf"), tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    for first in range(0, codes, CODES):
        code = first + tl.arange(0, CODES)
        is_code = code < codes
        products = tl.zeros([ROWS, CODES], tl.float32)
        for begin in range(0, dim, DEPTH):
            at = begin + tl.arange(0, DEPTH)
            z = tl.load(
                Z + row[:, None] * dim + at[None, :],
                mask=exists[:, None] & (at < dim)[None, :], other=0.0,
            )  # fmt: skip
            entries = tl.load(
                ENTRIES + code[None, :] * dim + at[:, None],
                mask=is_code[None, :] & (at < dim)[:, None], other=0.0,
            )  # fmt: skip
            products = tl.dot(z, entries, products, input_precision=PRECISION)
        # |z|^2 is the same for every code and is left out
        squared = tl.load(SQUARED + code, mask=is_code, other=float("inf"))
        distances = squared[None, :] - 2 * products
        distances = tl.where(distances == distances, distances, float("inf"))  # none is NaN
        least, place = tl.min(distances, 1, return_indices=True, return_indices_tie_break_left=True)
        is_nearer = least < best  # not where it is as near: ties go to the lowest index
        best = tl.where(is_nearer, least, best)
        found = tl.where(is_nearer, first + place, found)
    tl.store(OUT + row, found.to(tl.int64), mask=exists)


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Index [N] of the nearest of the entries [K,d] for every vector of z [N,d], both fp32.

    Ties go to the lowest index. Products are exact, or TF32 where torch's of matrices may be. A
    vector that is not finite gets any index.
    """
    (rows, dim), codes = z.shape, len(entries)
    z, entries = z.contiguous(), entries.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=z.device)
    _nearest_kernel[(triton.cdiv(rows, ROWS),)](
        z, entries, entries.square().sum(1), out, rows, codes, dim,
        ROWS, CODES, min(DEPTH, max(LEAST, triton.next_power_of_2(dim))),
        _precision(), num_warps=WARPS,
    )  # fmt: skip
    return out


def _precision() -> str:
    """That of torch's own products of fp32 matrices, as `engine.tf32` sets it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # then torch does not answer the older question
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
