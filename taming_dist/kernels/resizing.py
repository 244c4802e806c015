"""What goes into a convolution that changes the resolution: h + bias + residual, twice as large or
with a row and a column more, in one pass over memory. Rows as in `taming_dist.kernels.group_norm`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from taming_dist.kernels.group_norm import WARPS, Division


@triton.jit
def _place_kernel(
    H, BIAS, RESIDUAL, OUT, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr, DOUBLES: tl.constexpr,
):  # fmt: skip
    image, columns = tl.program_id(1).to(tl.int64), tl.arange(0, C)[None, :]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (rows < height * width)[:, None]
    at = image * height * width * C + rows[:, None] * C + columns
    v = tl.load(H + at, mask=exists, other=0.0).to(tl.float32)
    v += tl.load(BIAS + columns).to(tl.float32)
    if ADDS:
        v += tl.load(RESIDUAL + at, mask=exists, other=0.0).to(tl.float32)
    v = v.to(OUT.dtype.element_ty)
    y, x = rows // width, rows % width
    if DOUBLES:
        to = OUT + image * height * width * 4 * C + columns
        for below in tl.static_range(2):
            for beside in tl.static_range(2):
                pixel = (2 * y + below) * 2 * width + 2 * x + beside
                tl.store(to + pixel[:, None] * C, v, mask=exists)
    else:
        to = OUT + image * (height + 1) * (width + 1) * C + columns
        tl.store(to + (y * (width + 1) + x)[:, None] * C, v, mask=exists)


@triton.jit
def _gather_kernel(
    DOUT, DV, PARTS, height, width, each,
    C: tl.constexpr, ROWS: tl.constexpr, DOUBLES: tl.constexpr,
):  # fmt: skip
    """dv, and in PARTS [n,programs,c] its sums."""
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    columns = tl.arange(0, C)[None, :]
    sums = tl.zeros([ROWS, C], tl.float32)
    for first in range(0, each, ROWS):
        rows = part * each + first + tl.arange(0, ROWS)
        exists = (rows < height * width)[:, None]
        y, x = rows // width, rows % width
        if DOUBLES:
            dv = tl.zeros([ROWS, C], tl.float32)
            start = DOUT + image * height * width * 4 * C + columns
            for below in tl.static_range(2):
                for beside in tl.static_range(2):
                    pixel = (2 * y + below) * 2 * width + 2 * x + beside
                    found = tl.load(start + pixel[:, None] * C, mask=exists, other=0.0)
                    dv += found.to(tl.float32)
        else:
            start = DOUT + image * (height + 1) * (width + 1) * C + columns
            pixel = y * (width + 1) + x
            dv = tl.load(start + pixel[:, None] * C, mask=exists, other=0.0).to(tl.float32)
        at = image * height * width * C + rows[:, None] * C + columns
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=exists)
        sums += tl.where(exists, dv, 0.0)
    to = PARTS + (image * tl.num_programs(0) + part) * C + tl.arange(0, C)
    tl.store(to, tl.sum(sums, 0))


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, bias: Tensor, residual: Tensor | None, doubles: bool
    ) -> Tensor:
        cut, (n, c, height, width) = Division.of(h), h.shape
        ctx.shape, ctx.adds, ctx.doubles = h.shape, residual is not None, doubles
        size = (2 * height, 2 * width) if doubles else (height + 1, width + 1)
        out = torch.empty(
            (n, c, *size), dtype=h.dtype, device=h.device, memory_format=torch.channels_last
        )
        if not doubles:
            out[:, :, height].zero_()
            out[:, :, :, width].zero_()
        _place_kernel[(triton.cdiv(cut.pixels, cut.rows), n)](
            h, bias, residual if ctx.adds else h, out, height, width,
            c, cut.rows, ctx.adds, doubles, num_warps=WARPS,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dout = gradients[0].contiguous(memory_format=torch.channels_last)
        dv = torch.empty(
            ctx.shape, dtype=dout.dtype, device=dout.device, memory_format=torch.channels_last
        )
        cut, (_, c, height, width) = Division.of(dv), ctx.shape
        sums = cut.parts(1, dv)
        _gather_kernel[(cut.programs, cut.images)](
            dout, dv, sums, height, width, cut.each, c, cut.rows, ctx.doubles, num_warps=WARPS
        )
        return dv, sums.sum((0, 1, 2)), dv if ctx.adds else None, None


def doubled(h: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """h + bias + residual (None: 0), each pixel four times: [n,c,h,w] -> [n,c,2h,2w]."""
    found: Tensor = _Placed.apply(h, bias, residual, True)
    return found


def padded(h: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """h + bias + residual (None: 0) with zeros to the right and below: -> [n,c,h+1,w+1]."""
    found: Tensor = _Placed.apply(h, bias, residual, False)
    return found
