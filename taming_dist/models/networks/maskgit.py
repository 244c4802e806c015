"""MaskGIT's networks: residual convolutions without attention, averages where the paper's stride.

Source: arXiv 2202.04200, section 4.1, and the layout of its published tokenizer, on which TiTok and
RAR build (docs/checkpoints.md has the names).
Legend: b batch, c channels, h w pixels, i j latent grid.
"""

import dataclasses
from collections.abc import Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.models.autoencoder import (
    ConvolutionalDecoder,
    Level,
    Norm,
    ResnetBlock,
    UpLevel,
)
from taming_dist.models.convolution import Convolution, laid_out
from taming_dist.models.first_stage import DecoderNetwork
from taming_dist.models.networks.taming import ConvolutionalConfig


@dataclasses.dataclass
class MaskGITConfig(ConvolutionalConfig):
    """MaskGIT's networks; G has as many blocks as E, and reads entries of the codebook as they
    are."""

    name: str = "maskgit"

    @property
    def encoder_width(self) -> int:
        return self.channels * self.multipliers[-1]

    @property
    def decoder_width(self) -> None:
        return None

    def encoder(self) -> nn.Module:
        return MaskGITEncoder(self)

    def decoder(self) -> DecoderNetwork:
        return MaskGITDecoder(self)


class MaskGITBlock(ResnetBlock):
    """Residual block of convolutions without biases. Where it changes the width, what is added to
    its answer is a 1x1 convolution of that answer, not of its input: so were the published weights
    trained."""

    biased = False

    def shortcut(self, channels: int, out: int) -> nn.Module:
        return nn.Conv2d(out, out, 1, bias=False) if channels != out else nn.Identity()

    def residual(
        self, x: Float[Tensor, "b c h w"], h: Float[Tensor, "b out h w"]
    ) -> Float[Tensor, "b out h w"]:
        return x if isinstance(self.nin_shortcut, nn.Identity) else self.nin_shortcut(h)


class MaskGITDownLevel(Level):
    """A level of the encoder; all but the last average 2x2 pixels at their end."""

    kind = MaskGITBlock

    def __init__(self, channels: int, out: int, blocks: int, dropout: float, last: bool) -> None:
        super().__init__(channels, out, blocks, False, dropout)
        self.downsample = nn.Identity() if last else nn.AvgPool2d(2)

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        yield self.downsample


class MaskGITUpLevel(UpLevel):
    """A level of the decoder; all but the last double the resolution at their end."""

    kind = MaskGITBlock


def middle(width: int, config: MaskGITConfig) -> nn.Module:
    """The blocks of the lowest resolution."""
    blocks = (MaskGITBlock(width, width, config.dropout) for _ in range(config.blocks))
    return nn.Sequential(*blocks)


class MaskGITEncoder(nn.Module):
    """E: images in [-1,1] -> what the 1x1 convolution to the latents reads. It computes with pixels
    in [0,1], whose 0 is also what lies around the picture."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        width, last = config.channels, len(config.multipliers) - 1
        self.conv_in = Convolution(config.modality.channels, width, bias=False)
        levels = []
        for index, multiplier in enumerate(config.multipliers):
            out = config.channels * multiplier
            level = MaskGITDownLevel(width, out, config.blocks, config.dropout, index == last)
            levels.append(level)
            width = out
        self.down = nn.ModuleList(levels)
        self.mid = middle(width, config)
        self.norm_out = Norm(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width i j"]:
        h = self.conv_in(laid_out((x + 1) / 2))
        for level in self.down:
            h = level(h)
        return F.silu(self.norm_out(self.mid(h)))


class MaskGITDecoder(ConvolutionalDecoder):
    """G: entries of the codebook -> images, about in [-1,1]."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        last = len(config.multipliers) - 1
        width = config.channels * config.multipliers[-1]
        self.conv_in = Convolution(config.quantizer.dim, width)
        self.mid = middle(width, config)
        levels: list[UpLevel] = []
        for index in range(last, -1, -1):
            out = config.channels * config.multipliers[index]
            level = MaskGITUpLevel(width, out, config.blocks, False, config.dropout, index == 0)
            levels.insert(0, level)
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = Norm(width)
        self.conv_out = Convolution(width, config.modality.channels)
