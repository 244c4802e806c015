"""Encoder E and decoder G of the VQGAN: convolutional residual networks, attention where coarse.

Source: arXiv 2012.09841, table 7 (architecture) and appendix A; parameter names are those of the
original implementation, so that its checkpoints load without a map.
Legend: b batch, c channels, h w pixels, d latent channels, i j latent grid.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from taming_dist.models.convolution import Convolution, GroupNorm, laid_out
from taming_dist.models.first_stage import DecoderNetwork

GROUPS = 32  # of every GroupNorm, as in the original


class Moments(NamedTuple):
    """Mean and variance of each group of a whole image."""

    mean: Float64[Tensor, "groups"]
    variance: Float64[Tensor, "groups"]


class Norm(GroupNorm):
    """GroupNorm over 32 groups, eps 1e-6, by the moments of its input or by those given: of the
    image that the input is a part of."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(
        self, x: Float[Tensor, "b c h w"], moments: Moments | None = None
    ) -> Float[Tensor, "b c h w"]:
        if moments is None:
            return super().forward(x)
        each = self.num_channels // self.num_groups
        scale = self.weight * (moments.variance + self.eps).rsqrt().repeat_interleave(each)
        shift = self.bias - moments.mean.repeat_interleave(each) * scale
        scale, shift = scale.float()[:, None, None], shift.float()[:, None, None]
        return torch.addcmul(shift, x, scale).to(x.dtype)


class ResnetBlock(nn.Module):
    """Pre-activation residual block, in two halves of one norm and one 3x3 convolution each.

    A half takes the moments of its norm's input where it sees a part of an image only.
    `biased`: whether the 3x3 convolutions have biases.
    """

    biased: ClassVar[bool] = True

    def __init__(self, channels: int, out: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = Norm(channels)
        self.conv1 = Convolution(channels, out, bias=self.biased)
        self.norm2 = Norm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Convolution(out, out, bias=self.biased)
        self.nin_shortcut = self.shortcut(channels, out)

    def shortcut(self, channels: int, out: int) -> nn.Module:
        """The layer past the convolutions, called in `residual`."""
        return nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h w"]:
        return self.second(x, self.first(x))

    def first(
        self, x: Float[Tensor, "b c h w"], moments: Moments | None = None
    ) -> Float[Tensor, "b out h w"]:
        return self.conv1(F.silu(self.norm1(x, moments)))

    def second(
        self,
        x: Float[Tensor, "b c h w"],
        h: Float[Tensor, "b out h w"],
        moments: Moments | None = None,
    ) -> Float[Tensor, "b out h w"]:
        h = self.conv2(self.dropout(F.silu(self.norm2(h, moments))))
        return self.residual(x, h) + h

    def residual(
        self, x: Float[Tensor, "b c h w"], h: Float[Tensor, "b out h w"]
    ) -> Float[Tensor, "b out h w"]:
        """What is added to the answer h of the convolutions to x."""
        return self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the grid, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, c, h, w = x.shape
        y = self.norm(x)
        # [b,1,n,c], channels next to each other: fused kernels take nothing else, and without them
        # the n x n weights are held
        q, k, v = (
            layer(y).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)  # scale c^-0.5
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h//2 w//2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, upsampled=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
        return self.conv(x)


class Level(nn.Module):
    """The blocks of one resolution: residual blocks of a `kind`, each followed by attention where
    asked for."""

    kind: ClassVar[type[ResnetBlock]] = ResnetBlock

    def __init__(
        self, channels: int, out: int, blocks: int, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        widths = [channels] + [out] * blocks
        self.block = nn.ModuleList(
            self.kind(a, b, dropout) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks) if attention)

    def layers(self) -> Iterator[nn.Module]:
        """What `forward` goes through, in this order."""
        for index, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[index]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out _ _"]:
        for layer in self.layers():
            x = layer(x)
        return x


class DownLevel(Level):
    """A level of the encoder; all but the last halve the resolution at their end."""

    def __init__(
        self, channels: int, out: int, blocks: int, attention: bool, dropout: float, last: bool
    ) -> None:
        super().__init__(channels, out, blocks, attention, dropout)
        self.downsample: nn.Module = nn.Identity() if last else Downsample(out)

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        yield self.downsample


class UpLevel(Level):
    """A level of the decoder; all but the last double the resolution at their end."""

    def __init__(
        self, channels: int, out: int, blocks: int, attention: bool, dropout: float, last: bool
    ) -> None:
        super().__init__(channels, out, blocks, attention, dropout)
        self.upsample: nn.Module = nn.Identity() if last else Upsample(out)

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        yield self.upsample


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """E: images -> latents, i = h/f and j = w/f with f = 2^(len(multipliers)-1).

    `lean`: run it as `taming_dist.models.lean` does.
    """

    lean = False

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: int,
        multipliers: list[int],
        blocks: int,
        attention_resolutions: list[int],
        resolution: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_in = Convolution(in_channels, channels)
        levels: list[DownLevel] = []
        width, last = channels, len(multipliers) - 1
        for index, multiplier in enumerate(multipliers):
            out = channels * multiplier
            attention = (resolution >> index) in attention_resolutions
            levels.append(DownLevel(width, out, blocks, attention, dropout, index == last))
            width = out
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width, dropout)
        self.norm_out = Norm(width)
        self.conv_out = Convolution(width, latent_channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        if self.lean:
            from taming_dist.models import lean

            return lean.encoded(self, x)
        h = self.conv_in(laid_out(x))
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class ConvolutionalDecoder(DecoderNetwork):
    """G of levels of residual blocks. Where a picture is too large, `coarse`, `layers` and `fine`,
    which make up `features`, are called one by one (`generation.tiles`).
    """

    conv_in: Convolution
    mid: nn.Module
    up: nn.ModuleList  # of UpLevel; up[0] is the highest resolution, as in the original
    norm_out: Norm

    def stages(
        self, z: Float[Tensor, "b d i j"]
    ) -> tuple[Float[Tensor, "b width i j"], Float[Tensor, "b c h w"]]:
        coarse = h = self.coarse(z)
        for level in reversed(self.up):
            h = level(h)
        return coarse, self.fine(h)

    def layers(self) -> Iterator[nn.Module]:
        """What the levels are made of, in the order of `features`: `ResnetBlock`, `AttnBlock`,
        `Upsample` or the identity."""
        for level in reversed(self.up):
            assert isinstance(level, UpLevel)
            yield from level.layers()

    def coarse(self, z: Float[Tensor, "b d i j"]) -> Float[Tensor, "b c i j"]:
        """Before the levels: what has the size of the latents, attention over all of them."""
        return self.mid(self.conv_in(laid_out(z)))

    def fine(
        self, h: Float[Tensor, "b c h w"], moments: Moments | None = None
    ) -> Float[Tensor, "b c h w"]:
        """After the levels; `moments`: those of the image that h is a part of."""
        return F.silu(self.norm_out(h, moments))

    @property
    def widest(self) -> int:
        """The most channels of anything at full resolution."""
        inside = (m.num_channels for m in self.up[0].modules() if isinstance(m, Norm))
        return max(*inside, self.conv_out.in_channels, self.conv_out.out_channels)


class Decoder(ConvolutionalDecoder):
    """G: latents -> images; one block a level more than the encoder. `lean`: as in `Encoder`."""

    lean = False
    mid: Middle

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        channels: int,
        multipliers: list[int],
        blocks: int,
        attention_resolutions: list[int],
        resolution: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        last = len(multipliers) - 1
        width = channels * multipliers[-1]
        self.conv_in = Convolution(latent_channels, width)
        self.mid = Middle(width, dropout)
        levels: list[UpLevel] = []
        for index in range(last, -1, -1):
            out = channels * multipliers[index]
            attention = (resolution >> index) in attention_resolutions
            level = UpLevel(width, out, blocks + 1, attention, dropout, index == 0)
            levels.insert(0, level)
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = Norm(width)
        self.conv_out = Convolution(width, out_channels)

    def stages(
        self, z: Float[Tensor, "b d i j"]
    ) -> tuple[Float[Tensor, "b width i j"], Float[Tensor, "b c h w"]]:
        if self.lean:
            from taming_dist.models import lean

            return lean.stages(self, z)
        return super().stages(z)


def last_layer_gradients(
    features: Float[Tensor, "b c h w"],
    at_image: Sequence[Float[Tensor, "b out h w"]],
    dtype: torch.dtype = torch.float32,
) -> Float32[Tensor, "losses out c 3 3"]:
    """Gradients of several losses by the decoder's last convolution, from those at the image.

    features: the input of `Decoder.conv_out`; at_image: d loss / d image of each loss. Gives
    d loss / d weight without a walk through the network: the losses lie side by side as if they
    were more channels of one image, so that the features, the larger part by far, are read once.
    `dtype`: what is multiplied is rounded to; in bf16 channels are filled up to a multiple of 8,
    for tensor cores.
    """
    beside = torch.cat([gradient.to(dtype) for gradient in at_image], 1)
    channels = beside.shape[1]
    if dtype == torch.bfloat16:
        beside = F.pad(beside, (0, 0, 0, 0, 0, -channels % 8))
    shape = (beside.shape[1], features.shape[1], 3, 3)
    found = conv2d_weight(features.to(dtype), shape, beside, padding=1)[:channels]
    return found.float().unflatten(0, (len(at_image), -1))
