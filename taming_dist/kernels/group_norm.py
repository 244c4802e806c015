"""GroupNorm and SiLU between two convolutions, with as few passes over memory as they need.

A convolution leaves its bias, and the residual that is to be added, to the norm behind it. So this
reads v = h + bias + residual twice, for its statistics and to write y = silu(norm(v)), where torch
would read and write for each of the four; and likewise backwards. Arithmetic: arXiv 1803.08494.

Legend: n images, p pixels of one, c channels, g groups. v is [n,c,h,w] in channels_last: p rows of
c numbers. Per image and channel the norm is y = silu(scale * v + shift), and its gradient is
dv = scale * dz + slope * v + offset, dz = dy * silu'(z). What is added up over pixels is added up
by each program for its rows ("parts"), then by one program per image ("finish").
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TILE = 4096  # numbers that a program has at a time: on an H200 the best of 1024 to 8192
WARPS = 8
PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def _silu_gradient(z, dy):
    """dz, from dy."""
    chance = 1.0 / (1.0 + tl.exp(-z))
    return dy * chance * (1.0 + z * (1.0 - chance))


@triton.jit
def _rows(first, pixels, C: tl.constexpr, ROWS: tl.constexpr):
    """Places of ROWS pixels of this program's image from `first` on, and which of them exist."""
    rows = first + tl.arange(0, ROWS)
    start = tl.program_id(1).to(tl.int64) * pixels * C
    return start + rows[:, None] * C + tl.arange(0, C)[None, :], (rows < pixels)[:, None]


@triton.jit
def _leave(PARTS, one, two, C: tl.constexpr):
    """Leave the sums over rows of two tables for the program that adds up those of an image."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    to = PARTS + program * 2 * C + tl.arange(0, C)
    tl.store(to, tl.sum(one, 0))
    tl.store(to + C, tl.sum(two, 0))


@triton.jit
def _sum_kernel(
    H, BIAS, RESIDUAL, V, PARTS, pixels, each,
    C: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Add up v and v^2: PARTS [n,programs,2,c]. v is written if it WRITES, and has a residual if it
    ADDS."""
    part, columns = tl.program_id(0), tl.arange(0, C)
    sums = tl.zeros([ROWS, C], tl.float32)
    squares = tl.zeros([ROWS, C], tl.float32)
    bias = tl.load(BIAS + columns).to(tl.float32)[None, :]
    for first in range(0, each, ROWS):
        at, exists = _rows(part * each + first, pixels, C, ROWS)
        v = tl.load(H + at, mask=exists, other=0.0).to(tl.float32) + bias
        if ADDS:
            v += tl.load(RESIDUAL + at, mask=exists, other=0.0).to(tl.float32)
        if WRITES:
            rounded = v.to(V.dtype.element_ty)
            tl.store(V + at, rounded, mask=exists)
            v = rounded.to(tl.float32)
        v = tl.where(exists, v, 0.0)
        sums += v
        squares += v * v
    _leave(PARTS, sums, squares, C)


@triton.jit
def _added_up(PARTS, parts, C: tl.constexpr, ROWS: tl.constexpr):
    """Both sums [c] of this program's image."""
    columns = tl.arange(0, C)
    one = tl.zeros([ROWS, C], tl.float32)
    two = tl.zeros([ROWS, C], tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        exists = (part < parts)[:, None]
        at = (
            PARTS
            + (tl.program_id(0).to(tl.int64) * parts + part[:, None]) * 2 * C
            + columns[None, :]
        )
        one += tl.load(at, mask=exists, other=0.0)
        two += tl.load(at + C, mask=exists, other=0.0)
    return tl.sum(one, 0), tl.sum(two, 0)


@triton.jit
def _moments_kernel(
    PARTS, GAMMA, BETA, AFFINE, MOMENTS, parts, pixels, epsilon,
    C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """AFFINE [n,2,c]: scale and shift; MOMENTS [n,2,g]: mean and 1 / deviation."""
    image, columns, groups = tl.program_id(0).to(tl.int64), tl.arange(0, C), tl.arange(0, G)
    sums, squares = _added_up(PARTS, parts, C, ROWS)
    means = sums / pixels
    mean = tl.sum(tl.reshape(means, (G, C // G)), 1) / (C // G)
    # within channels and between them: the difference of two large numbers loses less
    within = tl.reshape(squares / pixels - means * means, (G, C // G))
    between = tl.reshape(means, (G, C // G)) - mean[:, None]
    variance = tl.sum(within + between * between, 1) / (C // G)
    inverse = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + epsilon)
    tl.store(MOMENTS + image * 2 * G + groups, mean)
    tl.store(MOMENTS + image * 2 * G + G + groups, inverse)
    gamma = tl.reshape(tl.load(GAMMA + columns).to(tl.float32), (G, C // G))
    beta = tl.reshape(tl.load(BETA + columns).to(tl.float32), (G, C // G))
    scale = gamma * inverse[:, None]
    shift = beta - scale * mean[:, None]
    tl.store(AFFINE + image * 2 * C + columns, tl.reshape(scale, (C,)))
    tl.store(AFFINE + image * 2 * C + C + columns, tl.reshape(shift, (C,)))


@triton.jit
def _normalized(V, BIAS, AFFINE, at, exists, C: tl.constexpr, ADDED: tl.constexpr):
    """v, which h is where the bias is not ADDED yet; scale; and z = scale * v + shift."""
    columns = tl.arange(0, C)
    v = tl.load(V + at, mask=exists, other=0.0).to(tl.float32)
    if not ADDED:
        v += tl.load(BIAS + columns).to(tl.float32)[None, :]
    affine = AFFINE + tl.program_id(1).to(tl.int64) * 2 * C + columns
    scale = tl.load(affine)[None, :]
    return v, scale, v * scale + tl.load(affine + C)[None, :]


@triton.jit
def _apply_kernel(
    V, BIAS, AFFINE, Y, pixels,
    C: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    at, exists = _rows(tl.program_id(0) * ROWS, pixels, C, ROWS)
    _, _, z = _normalized(V, BIAS, AFFINE, at, exists, C, ADDED)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(Y + at, z.to(Y.dtype.element_ty), mask=exists)


@triton.jit
def _gradient_sum_kernel(
    V, BIAS, AFFINE, DY, PARTS, pixels, each,
    C: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Add up dz and dz * v: PARTS [n,programs,2,c]."""
    part = tl.program_id(0)
    sums = tl.zeros([ROWS, C], tl.float32)
    products = tl.zeros([ROWS, C], tl.float32)
    for first in range(0, each, ROWS):
        at, exists = _rows(part * each + first, pixels, C, ROWS)
        v, _, z = _normalized(V, BIAS, AFFINE, at, exists, C, ADDED)
        dz = tl.load(DY + at, mask=exists, other=0.0).to(tl.float32)
        if SILU:
            dz = _silu_gradient(z, dz)
        sums += dz
        products += dz * v
    _leave(PARTS, sums, products, C)


@triton.jit
def _gradient_line_kernel(
    PARTS, GAMMA, MOMENTS, LINE, DAFFINE, parts, pixels,
    C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """LINE [n,2,c]: slope and offset; DAFFINE [n,2,c]: the gradients of gamma and beta."""
    image, columns, groups = tl.program_id(0).to(tl.int64), tl.arange(0, C), tl.arange(0, G)
    sums, products = _added_up(PARTS, parts, C, ROWS)
    mean = tl.load(MOMENTS + image * 2 * G + groups)[:, None]
    inverse = tl.load(MOMENTS + image * 2 * G + G + groups)[:, None]
    gamma = tl.reshape(tl.load(GAMMA + columns).to(tl.float32), (G, C // G))
    of_beta = tl.reshape(sums, (G, C // G))
    of_gamma = (tl.reshape(products, (G, C // G)) - mean * of_beta) * inverse
    numbers = pixels * (C // G)
    first = (tl.sum(gamma * of_beta, 1) / numbers)[:, None]
    second = (tl.sum(gamma * of_gamma, 1) / numbers)[:, None]
    all_of_it = tl.zeros([G, C // G], tl.float32)
    slope = all_of_it - inverse * inverse * second
    offset = all_of_it - inverse * first + inverse * inverse * second * mean
    tl.store(LINE + image * 2 * C + columns, tl.reshape(slope, (C,)))
    tl.store(LINE + image * 2 * C + C + columns, tl.reshape(offset, (C,)))
    tl.store(DAFFINE + image * 2 * C + columns, tl.reshape(of_gamma, (C,)))
    tl.store(DAFFINE + image * 2 * C + C + columns, tl.reshape(of_beta, (C,)))


@triton.jit
def _gradient_kernel(
    V, BIAS, AFFINE, LINE, DY, DSUM, DV, PARTS, pixels, each,
    C: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, ADDED: tl.constexpr,
    READ: tl.constexpr,
):  # fmt: skip
    """dv, with the gradient DSUM of v itself if others READ it; PARTS [n,programs,c]: its sums."""
    part, columns = tl.program_id(0), tl.arange(0, C)
    line = LINE + tl.program_id(1).to(tl.int64) * 2 * C + columns
    slope, offset = tl.load(line)[None, :], tl.load(line + C)[None, :]
    sums = tl.zeros([ROWS, C], tl.float32)
    for first in range(0, each, ROWS):
        at, exists = _rows(part * each + first, pixels, C, ROWS)
        v, scale, z = _normalized(V, BIAS, AFFINE, at, exists, C, ADDED)
        dz = tl.load(DY + at, mask=exists, other=0.0).to(tl.float32)
        if SILU:
            dz = _silu_gradient(z, dz)
        dv = scale * dz + slope * v + offset
        if READ:
            dv += tl.load(DSUM + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=exists)
        sums += tl.where(exists, dv, 0.0)
    to = PARTS + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + part) * C + columns
    tl.store(to, tl.sum(sums, 0))


@cache
def _processors(device: torch.device) -> int:
    """How many programs run side by side, over those of one processor."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 1  # the interpreter


@dataclass(frozen=True)
class Division:
    """How the pixels of a batch [n,c,h,w] are shared out: `programs` an image, each with `each`
    pixels (the last with fewer), `rows` at a time."""

    images: int
    channels: int
    pixels: int
    rows: int
    each: int
    programs: int

    @classmethod
    def of(cls, v: Tensor) -> "Division":
        """That of a batch."""
        images, channels, height, width = v.shape
        pixels, rows = height * width, max(1, TILE // channels)
        wanted = max(1, PROGRAMS_PER_PROCESSOR * _processors(v.device) // images)
        each = triton.cdiv(triton.cdiv(pixels, wanted), rows) * rows
        return cls(images, channels, pixels, rows, each, triton.cdiv(pixels, each))

    def parts(self, sums: int, like: Tensor) -> Tensor:
        """Room for so many sums per channel of every program."""
        shape = (self.images, self.programs, sums, self.channels)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    @property
    def finish_rows(self) -> int:
        """Parts that a finishing program has at a time."""
        return max(1, min(32, TILE // self.channels))


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs: `v`, or h where the bias is not `added` to it; see above."""

    v: Tensor
    bias: Tensor
    gamma: Tensor
    affine: Tensor
    moments: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.v, self.bias, self.gamma, self.affine, self.moments


@dataclass(frozen=True)
class How:
    """Constants of a norm. `silu`: it is followed by one; `added`: v is written."""

    groups: int
    epsilon: float
    silu: bool
    added: bool


def _forward(
    h: Tensor, bias: Tensor, residual: Tensor | None, gamma: Tensor, beta: Tensor, how: How
) -> tuple[Tensor, Kept]:
    """y, and what is kept, v among it."""
    cut = Division.of(h)
    n, c, grid = cut.images, cut.channels, (cut.programs, cut.images)
    v = torch.empty_like(h) if how.added else h
    parts = cut.parts(2, h)
    adds = residual is not None
    _sum_kernel[grid](
        h, bias, residual if adds else h, v, parts, cut.pixels, cut.each,
        c, cut.rows, adds, how.added, num_warps=WARPS,
    )  # fmt: skip
    affine, moments = _float32(h, n, 2, c), _float32(h, n, 2, how.groups)
    _moments_kernel[(n,)](
        parts, gamma, beta, affine, moments, cut.programs, cut.pixels, how.epsilon,
        c, how.groups, cut.finish_rows, num_warps=WARPS,
    )  # fmt: skip
    y = torch.empty_like(h)
    _apply_kernel[(triton.cdiv(cut.pixels, cut.rows), n)](
        v, bias, affine, y, cut.pixels, c, cut.rows, how.silu, how.added, num_warps=WARPS
    )
    return y, Kept(v, bias, gamma, affine, moments)


def _backward(
    kept: Kept, dy: Tensor, dsum: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, the bias, gamma and beta, from those of y and, where others read v, of v."""
    cut = Division.of(kept.v)
    n, c, grid = cut.images, cut.channels, (cut.programs, cut.images)
    dy = dy.contiguous(memory_format=torch.channels_last)
    reads = dsum is not None
    dsum = dsum.contiguous(memory_format=torch.channels_last) if dsum is not None else dy
    parts = cut.parts(2, dy)
    _gradient_sum_kernel[grid](
        kept.v, kept.bias, kept.affine, dy, parts, cut.pixels, cut.each,
        c, cut.rows, how.silu, how.added, num_warps=WARPS,
    )  # fmt: skip
    line, of_affine = _float32(dy, n, 2, c), _float32(dy, n, 2, c)
    _gradient_line_kernel[(n,)](
        parts, kept.gamma, kept.moments, line, of_affine, cut.programs, cut.pixels,
        c, how.groups, cut.finish_rows, num_warps=WARPS,
    )  # fmt: skip
    dv, sums = torch.empty_like(kept.v), cut.parts(1, dy)
    _gradient_kernel[grid](
        kept.v, kept.bias, kept.affine, line, dy, dsum, dv, sums, cut.pixels, cut.each,
        c, cut.rows, how.silu, how.added, reads, num_warps=WARPS,
    )  # fmt: skip
    of_gamma, of_beta = of_affine.sum(0)
    return dv, sums.sum((0, 1, 2)), of_gamma, of_beta


class _Normed(torch.autograd.Function):
    """y = silu(norm(h + bias)); the sum is never written."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, how: How) -> Tensor:
        y, kept = _forward(h, bias, None, gamma, beta, how)
        ctx.save_for_backward(*kept.tensors())
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        return *_backward(Kept(*ctx.saved_tensors), dy, None, ctx.how), None


class _Summed(torch.autograd.Function):
    """v = h + bias + residual (None: 0) and y = silu(norm(v))."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        how: How,
    ) -> tuple[Tensor, Tensor]:
        y, kept = _forward(h, bias, residual, gamma, beta, how)
        ctx.save_for_backward(*kept.tensors())
        ctx.how, ctx.adds = how, residual is not None
        ctx.set_materialize_grads(False)  # None where nobody else reads v
        return kept.v, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dsum, dy = gradients
        kept = Kept(*ctx.saved_tensors)
        dv, of_bias, of_gamma, of_beta = _backward(kept, dy, dsum, ctx.how)
        return dv, of_bias, dv if ctx.adds else None, of_gamma, of_beta, None


def normed(h: Tensor, bias: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(h + bias)). h [n,c,h,w] in channels_last, bias [c]."""
    how = How(norm.num_groups, norm.eps, silu=True, added=False)
    found: Tensor = _Normed.apply(h, bias, norm.weight, norm.bias, how)
    return found


def summed(
    h: Tensor, bias: Tensor, residual: Tensor | None, norm: nn.GroupNorm, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """v = h + bias + residual (None: 0), and silu(norm(v)), or norm(v) without `silu`.

    h and residual [n,c,h,w] in channels_last, bias [c].
    """
    how = How(norm.num_groups, norm.eps, silu=silu, added=True)
    found: tuple[Tensor, Tensor] = _Summed.apply(h, bias, residual, norm.weight, norm.bias, how)
    return found
