"""Encoder and decoder with the fewest passes over memory: channels_last, and one kernel of our own
between two convolutions (`taming_dist.kernels`). The networks are those of
`taming_dist.models.autoencoder`, to be run in bf16 or fp16 on NVIDIA GPUs.

A convolution runs without its bias. Its output, that bias and the residual are a `Sum` that nobody
has added up yet: the layer that reads it says in which form it is wanted.

Needs Triton: import it only where the kernels are used.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.kernels.group_norm import normed, summed
from taming_dist.kernels.resizing import doubled, padded
from taming_dist.models.autoencoder import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
)


@dataclass(frozen=True)
class Sum:
    """h + bias + residual (None: 0), [b,c,h,w] in channels_last, not added up yet."""

    h: Float[Tensor, "b c h w"]
    bias: Float[Tensor, "c"]
    residual: Float[Tensor, "b c h w"] | None = None

    def added_up(self) -> Float[Tensor, "b c h w"]:
        """The sum itself."""
        sum_ = self.h + self.bias.to(self.h.dtype)[:, None, None]
        return sum_ if self.residual is None else sum_ + self.residual

    def normed(
        self, norm: nn.GroupNorm, silu: bool = True
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """The sum itself, and silu(norm(sum)), or norm(sum)."""
        return summed(self.h, self.bias, self.residual, norm, silu)


def encoded(encoder: Encoder, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
    """`Encoder.forward`."""
    sum_ = convolved(encoder.conv_in, x.contiguous(memory_format=torch.channels_last))
    for level in encoder.down:
        assert isinstance(level, Level)
        sum_ = walked(level.layers(), sum_)
    _, y = middle(encoder.mid, sum_).normed(encoder.norm_out)
    latents: Tensor = encoder.conv_out(y)
    return latents


def stages(
    decoder: Decoder, z: Float[Tensor, "b d i j"]
) -> tuple[Float[Tensor, "b width i j"], Float[Tensor, "b c h w"]]:
    """`Decoder.stages`."""
    start = convolved(decoder.conv_in, z.contiguous(memory_format=torch.channels_last))
    coarse = middle(decoder.mid, start)
    _, y = walked(decoder.layers(), coarse).normed(decoder.norm_out)
    return coarse.added_up(), y


def middle(layers: Middle, sum_: Sum) -> Sum:
    """`Middle.forward`."""
    return walked([layers.block_1, layers.attn_1, layers.block_2], sum_)


def walked(layers: Iterable[nn.Module], sum_: Sum) -> Sum:
    """One layer after the other."""
    for layer in layers:
        if isinstance(layer, ResnetBlock):
            sum_ = resnet_block(layer, sum_)
        elif isinstance(layer, AttnBlock):
            sum_ = attention_block(layer, sum_)
        elif isinstance(layer, Downsample):
            sum_ = convolved(layer.conv, padded(sum_.h, sum_.bias, sum_.residual))
        elif isinstance(layer, Upsample):
            sum_ = convolved(layer.conv, doubled(sum_.h, sum_.bias, sum_.residual))
        else:
            assert isinstance(layer, nn.Identity)
    return sum_


def resnet_block(block: ResnetBlock, sum_: Sum) -> Sum:
    """`ResnetBlock.forward`."""
    x, y = sum_.normed(block.norm1)
    y = normed(convolution(block.conv1, y), bias_of(block.conv1), block.norm2)
    h = convolution(block.conv2, block.dropout(y))
    shortcut = block.nin_shortcut
    if isinstance(shortcut, nn.Conv2d):
        return Sum(h, bias_of(block.conv2) + bias_of(shortcut), convolution(shortcut, x))
    return Sum(h, bias_of(block.conv2), x)


def attention_block(block: AttnBlock, sum_: Sum) -> Sum:
    """`AttnBlock.forward`. In channels_last a 1x1 convolution is a linear layer."""
    x, y = sum_.normed(block.norm, silu=False)
    b, c, h, w = x.shape
    rows = y.permute(0, 2, 3, 1).reshape(b, 1, h * w, c)  # one head: fused kernels ask for it
    q, k, v = (
        F.linear(rows, layer.weight.flatten(1), layer.bias) for layer in (block.q, block.k, block.v)
    )
    attended = F.scaled_dot_product_attention(q, k, v)
    out = F.linear(attended, block.proj_out.weight.flatten(1))
    return Sum(out.reshape(b, h, w, c).permute(0, 3, 1, 2), bias_of(block.proj_out), x)


def convolved(layer: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Sum:
    """A convolution whose bias is still to be added."""
    return Sum(convolution(layer, x), bias_of(layer))


def bias_of(layer: nn.Conv2d) -> Float[Tensor, "c"]:
    """The bias, which every convolution of these networks has."""
    assert layer.bias is not None
    return layer.bias


def convolution(layer: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out i j"]:
    """A convolution without its bias. Dtype and layout of the weight change in one pass over it;
    autocast and cuDNN would take two."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weight = layer.weight.to(dtype, memory_format=torch.channels_last)
    return torch.conv2d(x.to(dtype), weight, None, layer.stride, layer.padding)
