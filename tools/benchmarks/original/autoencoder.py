"""Encoder and decoder as the original computes them: each operation by itself, as PyTorch has it.

Legend: b batch, c channels, h w pixels, d latent channels, i j latent grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swish(x: Tensor) -> Tensor:
    """x times its logistic function, two operations."""
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Norm, swish and 3x3 convolution, twice, and a residual."""

    def __init__(self, channels: int, out: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """Attention over all positions, whose weights [b,n,n] are held."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).reshape(b, c, h * w) for layer in (self.q, self.k, self.v))
        weights = torch.bmm(q.permute(0, 2, 1), k) * int(c) ** -0.5
        weights = F.softmax(weights, dim=2)
        read = torch.bmm(v, weights.permute(0, 2, 1))
        return x + self.proj_out(read.reshape(b, c, h, w))


class Downsample(nn.Module):
    """A strided convolution, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="constant", value=0))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and what changes it at their end."""

    def __init__(
        self, channels: int, out: int, blocks: int, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        widths = [channels, *[out] * blocks]
        self.block = nn.ModuleList(
            ResnetBlock(widths[k], widths[k + 1], dropout) for k in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks) if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images [b,c,h,w] -> latents [b,d,i,j]; `config`: a `VQGANConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        last, width = len(config.multipliers) - 1, config.channels
        self.conv_in = nn.Conv2d(config.modality.channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, multiplier in enumerate(config.multipliers):
            out = config.channels * multiplier
            attention = (config.resolution >> index) in config.attention_resolutions
            level = Level(width, out, config.blocks, attention, config.dropout)
            level.downsample = None if index == last else Downsample(out)
            self.down.append(level)
            width = out
        self.mid = Middle(width, config.dropout)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents [b,d,i,j] -> images [b,c,h,w]; one block a level more than the encoder."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        last = len(config.multipliers) - 1
        width = config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, config.dropout)
        levels: list[Level] = []
        for index in range(last, -1, -1):
            out = config.channels * config.multipliers[index]
            attention = (config.resolution >> index) in config.attention_resolutions
            level = Level(width, out, config.blocks + 1, attention, config.dropout)
            level.upsample = None if index == 0 else Upsample(out)
            levels.insert(0, level)
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, config.modality.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(swish(self.norm_out(h)))
