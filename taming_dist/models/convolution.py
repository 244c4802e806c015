"""Layers that take the shorter way on the CPU, and the layout that they are read in.

Parameters, their names and their values are those of torch's layers.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.kernels import group_norm_cpu, winograd
from taming_dist.models.quick import Quick


class Convolution(Quick, nn.Conv2d):
    """A 3x3 convolution that keeps the size, on the CPU by `taming_dist.kernels.winograd`.

    `upsampled`: its input is doubled before, by nearest neighbours.
    """

    def __init__(self, channels: int, out: int, upsampled: bool = False, bias: bool = True) -> None:
        super().__init__(channels, out, 3, padding=1, bias=bias)
        self.upsampled = upsampled

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out i j"]:
        if self.fast and winograd.pays(x, self.weight, self.upsampled):
            return winograd.convolution(x, self.weight, self.bias, self.upsampled)
        if self.upsampled:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return super().forward(x)


class GroupNorm(Quick, nn.GroupNorm):
    """GroupNorm, whose gradient is on the CPU that of `taming_dist.kernels.group_norm_cpu`."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.fast and group_norm_cpu.pays(x):
            norm = group_norm_cpu.group_norm
            return norm(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def laid_out(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images as convolutions read them best: channels_last on the CPU, where all that stands
    between convolutions keeps it. On GPUs as they are: torch's GroupNorm would change it back."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
