"""GroupNorm of channels_last images on the CPU: torch's own, but for the gradient.

torch's gradient takes two to five times as long (docs/speed.md). It needs two sums over the pixels
of an image and channel, of dy and of dy * x; the rest is dx = scale * dy + slope * x + offset.
Arithmetic: arXiv 1803.08494; everything is added up in fp32.

Legend: n images, c channels, g groups, h w pixels, p = h * w.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = {  # numbers of an image: below, the way through Python takes longer than it saves
    torch.float32: 2**18,
    torch.bfloat16: 2**16,
}


def pays(x: Tensor) -> bool:
    """Whether `group_norm` takes x, and faster than torch's own: on the CPU in channels_last, large
    images, where a gradient is wanted. Not while torch compiles."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor  # none that only stands for one, as where operations are counted
        and x.device.type == "cpu"
        and x.requires_grad
        and torch.is_grad_enabled()
        and x.dtype in LEAST
        and x.shape[1:].numel() >= LEAST[x.dtype]
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
    """The norm of x [n,c,h,w], as torch gives it; differentiable once."""
    found: Tensor = _GroupNorm.apply(x, weight, bias, groups, epsilon)
    return found


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float
    ) -> Tensor:
        n, c, h, w = x.shape
        y, mean, inverse = torch.native_group_norm(x, weight, bias, n, c, h * w, groups, epsilon)
        ctx.save_for_backward(x, weight, mean.float(), inverse.float())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        n, c, h, w = x.shape
        mean, inverse = mean.view(n, -1, 1), inverse.view(n, -1, 1)
        gamma = weight.float().view(1, mean.shape[1], -1)
        wide, dy = _rows(x), _rows(gradients[0])  # [n,p,c]
        of_beta = _summed(dy).view(n, -1, gamma.shape[2])
        of_gamma = (_summed(dy * wide).view(of_beta.shape) - mean * of_beta) * inverse

        numbers = h * w * gamma.shape[2]
        first = inverse * (gamma * of_beta).sum(2, keepdim=True) / numbers
        second = inverse.square() * (gamma * of_gamma).sum(2, keepdim=True) / numbers
        line = (gamma * inverse, -second, second * mean - first)
        scale, slope, offset = (each.expand_as(of_beta).reshape(n, 1, c) for each in line)
        dx = torch.addcmul(offset, wide, slope).addcmul_(dy, scale).to(x.dtype)
        dx = dx.view(n, h, w, c).permute(0, 3, 1, 2)
        return dx, of_gamma.sum(0).view(c), of_beta.sum(0).view(c), None, None


def _rows(x: Tensor) -> Tensor:
    """[n,c,h,w] as [n,p,c] in fp32, a view where it is one."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).float()


def _summed(rows: Tensor) -> Tensor:
    """The sum [n,1,c] over the rows of [n,p,c], as a product of matrices: shared by threads."""
    ones = rows.new_ones(1, 1, 1).expand(len(rows), 1, rows.shape[1])
    return torch.bmm(ones, rows)
