"""3x3 convolutions with a quarter of the multiplications, for fp32 on the CPU: F(4x4, 3x3).

Source: arXiv 1509.09308, section 4. A tile of 4x4 outputs y of one channel pair is
A ((G w G^T) * (B x B^T)) A^T, x its 6x6 inputs: 36 products instead of 144, so that a convolution
is 36 matrix products over channels. The points that the matrices come from are 0, 1, -1, 1/2, -2
(after arXiv 1803.10986), which round half as much as 0, 1, -1, 2, -2. Both steps of A, B and G are
one matrix product (Kronecker), and tiles go by in chunks that stay in the cache.

A convolution behind nearest upsampling reads each pixel four times: its 6x6 inputs are 4x4 pixels,
so the larger image is never made.

Legend: n images, c channels in, o out, h w pixels of the output, t tiles of a chunk.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4  # outputs across
CHUNK = 128  # tiles: 36 numbers of each channel, in and out, 4.7 MB at 128 channels
CHANNELS = 128  # fewer than these, in or out, are not worth the way there and back
LEAST = 32  # tiles of an image: the weights have a way to go as well

A = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 0.5, -2, 0],
    [0, 1, 1, 0.25, 4, 0],
    [0, 1, -1, 0.125, -8, 1],
]
B = [
    [0.5, -0.75, -1, 0.75, 0.5, 0],
    [0, -0.5, 0.25, 1.25, 0.5, 0],
    [0, 0.5, -1.25, 0.25, 0.5, 0],
    [0, -1, -0.5, 1, 0.5, 0],
    [0, 0.5, -1, -0.5, 1, 0],
    [0, 0.5, -0.75, -1, 0.75, 0.5],
]
G = [  # times 45
    [90, 0, 0],
    [30, 30, 30],
    [-30, 30, -30],
    [-96, -48, -24],
    [3, -6, 12],
    [0, 0, 90],
]
DOUBLED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


class _Matrices(NamedTuple):
    """`output` [16,36], `input` [36,36] (of a doubled image [36,16]), `weight` [36,9]."""

    output: Tensor
    input: Tensor
    weight: Tensor


@cache
def _matrices(doubled: bool) -> _Matrices:
    a, b, g = (torch.tensor(rows, dtype=torch.float64) for rows in (A, B, G))
    if doubled:
        b = b @ torch.tensor(DOUBLED, dtype=torch.float64)
    return _Matrices(*(torch.kron(each, each).float() for each in (a, b, g / 45)))


def pays(x: Tensor, weight: Tensor, doubled: bool = False) -> bool:
    """Whether `convolution` takes them, and faster than torch's own: on the CPU in fp32, many
    channels, sides of a multiple of 4. Not while torch compiles. How many images there are does
    not count, so that none depends on those beside it."""
    _, _, h, w = x.shape
    tile = TILE // 2 if doubled else TILE
    return (
        type(x) is Tensor  # none that only stands for one, as where operations are counted
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and min(weight.shape[:2]) >= CHANNELS
        and h % tile == w % tile == 0
        and h * w >= LEAST * tile * tile
    )


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool = False) -> Tensor:
    """The convolution of x [n,c,h,w], or of its nearest upsampling to twice the size, with weight
    [o,c,3,3], padded by 1; in channels_last, differentiable once."""
    found: Tensor = _Convolution.apply(x, weight, bias, doubled)
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.doubled, ctx.biased = doubled, bias is not None
        return _convolved(x, _transformed(weight).transpose(1, 2), bias, doubled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        dx = dw = db = None
        if of_x:
            dx = _convolved(dy, _transformed(weight.flip(2, 3)), None, False)
            if ctx.doubled:
                dx = dx.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).sum((3, 5))
        if of_weight:
            dw = _of_weight(x, dy, ctx.doubled)
        if ctx.biased and of_bias:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None


def _transformed(weight: Tensor) -> Tensor:
    """G w G^T [36,o,c]."""
    o, c = weight.shape[:2]
    return (_matrices(False).weight @ weight.reshape(o * c, 9).T).view(36, o, c)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
    """The convolution with transformed weights [36,c,o]."""
    scale, matrices = 2 if doubled else 1, _matrices(doubled)
    n, c, h, w = x.shape
    o = weight.shape[2]
    y = torch.empty(n, o, h * scale, w * scale, memory_format=torch.channels_last)
    inputs, outputs = _inputs(x, doubled), _outputs(y)

    for chunk in _chunks(outputs):
        v = matrices.input @ inputs[chunk].reshape(-1, _size(outputs[chunk]) * c)
        m = torch.bmm(v.view(36, -1, c), weight)
        tiles = (matrices.output @ m.view(36, -1)).view(outputs[chunk].shape)
        if bias is None:
            outputs[chunk].copy_(tiles)
        else:
            torch.add(tiles, bias, out=outputs[chunk])
    return y


def _of_weight(x: Tensor, dy: Tensor, doubled: bool) -> Tensor:
    """d loss / d weight [o,c,3,3]."""
    matrices = _matrices(doubled)
    c, o = x.shape[1], dy.shape[1]
    inputs = _inputs(x, doubled)
    outputs = _outputs(dy)
    total = x.new_zeros(36, o, c)
    for chunk in _chunks(outputs):
        tiles = _size(outputs[chunk])
        v = matrices.input @ inputs[chunk].reshape(-1, tiles * c)
        dm = matrices.output.T @ outputs[chunk].reshape(16, tiles * o)
        total.baddbmm_(dm.view(36, tiles, o).transpose(1, 2), v.view(36, tiles, c))
    return (total.view(36, o * c).T @ matrices.weight).view(o, c, 3, 3)


def _inputs(x: Tensor, doubled: bool) -> Tensor:
    """What the tiles read of [n,c,h,w], a view of it with a margin of zeros: [r,r,n,i,j,c], r
    pixels across."""
    n, c, h, w = x.shape
    padded = x.new_empty(n, h + 2, w + 2, c)
    padded[:, 0].zero_(), padded[:, -1].zero_()
    padded[:, :, 0].zero_(), padded[:, :, -1].zero_()
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    size, step = (4, 2) if doubled else (6, 4)
    return padded.unfold(1, size, step).unfold(2, size, step).permute(4, 5, 0, 1, 2, 3)


def _outputs(y: Tensor) -> Tensor:
    """The tiles of [n,o,h,w], a view: [4,4,n,i,j,o]."""
    tiles = y.permute(0, 2, 3, 1).unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    return tiles.permute(2, 4, 0, 1, 3, 5)


def _chunks(outputs: Tensor) -> Iterator[tuple[slice, ...]]:
    """Whole rows of tiles of one image: products of the same sizes, however many images."""
    _, _, n, rows, columns, _ = outputs.shape
    step, everything = max(1, CHUNK // columns), slice(None)
    for image in range(n):
        for row in range(0, rows, step):
            yield everything, everything, slice(image, image + 1), slice(row, row + step)


def _size(tiles: Tensor) -> int:
    """How many tiles there are in [4,4,n,i,j,o]."""
    return tiles.shape[2] * tiles.shape[3] * tiles.shape[4]
