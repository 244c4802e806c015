"""Vision transformers as encoder and decoder: patches are tokens, and a code stands for one patch.

Source: arXiv 2110.04627 (ViT-VQGAN), section 3.1; registers: arXiv 2309.16588; the block is that of
`taming_dist.models.prior.blocks.llama`, where every token sees all others; the convolution at the
end, in which patches meet: arXiv 2406.07550 (TiTok), section 3.
Legend: b batch, c channels, h w pixels, n tokens, d latent channels, i j latent grid.
"""

import dataclasses

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.convolution import Convolution, laid_out
from taming_dist.models.first_stage import DecoderNetwork, FirstStageConfig
from taming_dist.models.initial import draw_normal
from taming_dist.models.prior.blocks.cache import Around
from taming_dist.models.prior.blocks.interface import BlockSizes
from taming_dist.models.prior.blocks.llama import EPS, LlamaBlock, LlamaBlockConfig
from taming_dist.models.prior.blocks.rotary import rotations
from taming_dist.ranges import ranged

STD = 0.02  # of weights at first
BLOCK = LlamaBlockConfig()


@dataclasses.dataclass
class ViTConfig(FirstStageConfig):
    """`depth` blocks each in E and G, of `width` channels and `heads` heads, over patches of
    `patch` x `patch` pixels and `registers` tokens that belong to no place."""

    patch: int = ranged(16, at_least=1, compared=False)
    width: int = ranged(512, at_least=1, compared=False)
    depth: int = ranged(8, at_least=1, compared=False)
    heads: int = ranged(8, at_least=1, compared=False)
    registers: int = ranged(4, at_least=0, compared=False)
    name: str = "vit"

    @property
    def factor(self) -> int:
        return self.patch

    @property
    def encoder_width(self) -> int:
        return self.width

    @property
    def decoder_width(self) -> int:
        return self.width

    @property
    def coarse_width(self) -> int:
        return self.width

    def check(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise UserError(
                f"model.heads={self.heads}: width={self.width} has to be a multiple of "
                f"{4 * self.heads}, 4 times as many; heads are usually 64 wide"
            )

    def encoder(self) -> nn.Module:
        return ViTEncoder(self)

    def decoder(self) -> DecoderNetwork:
        return ViTDecoder(self)


class Blocks(nn.Module):
    """All blocks over the tokens of a grid, each told its row and column by rotations."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        # the grid's sizes are for blocks that learn positions, which this one does not
        sizes = BlockSizes(
            config.width, config.heads, 0.0, 0.0, False, config.registers, config.registers, (0, 0)
        )
        self.registers: nn.Parameter | None = None
        if config.registers:
            first = torch.empty(config.registers, config.width)
            draw_normal(first, 0.0, STD)
            self.registers = nn.Parameter(first)
        self.blocks = nn.ModuleList(LlamaBlock(sizes, BLOCK) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, EPS)

    def forward(self, x: Float[Tensor, "b n c"], columns: int) -> Float[Tensor, "b n c"]:
        """Tokens of a grid of so many columns, row by row; registers stay inside."""
        x = x.to(self.norm.weight.dtype)  # what the blocks add up; autocast would round it
        places = torch.arange(x.shape[1], device=x.device)
        before = 0
        if self.registers is not None:
            before = len(self.registers)
            x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
            places = torch.cat([places.new_full((before,), -1), places])
        around = Around(rotations(places, columns, self.head_width))
        for block in self.blocks:
            x = block(x, around)
        return self.norm(x[:, before:])


class ViTEncoder(nn.Module):
    """E: images -> tokens, as a grid."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.patches = nn.Linear(config.modality.channels * config.patch**2, config.width)
        self.body = Blocks(config)
        self.apply(_initialise)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width i j"]:
        p = self.patch
        columns = x.shape[-1] // p
        pixels = rearrange(x, "b c (i p) (j q) -> b (i j) (p q c)", p=p, q=p)
        tokens = self.body(self.patches(pixels), columns)
        return rearrange(tokens, "b (i j) c -> b c i j", j=columns)


class ViTDecoder(DecoderNetwork):
    """G: tokens as a grid -> images. The last convolution starts as the identity."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch, channels = config.patch, config.modality.channels
        self.body = Blocks(config)
        self.pixels = nn.Linear(config.width, channels * config.patch**2)
        self.conv_out = Convolution(channels, channels)
        self.apply(_initialise)

    def stages(
        self, z: Float[Tensor, "b d i j"]
    ) -> tuple[Float[Tensor, "b width i j"], Float[Tensor, "b c h w"]]:
        columns, p = z.shape[-1], self.patch
        tokens = self.body(rearrange(z, "b d i j -> b (i j) d"), columns)
        images = rearrange(
            self.pixels(tokens), "b (i j) (p q c) -> b c (i p) (j q)", j=columns, p=p, q=p
        )
        return rearrange(tokens, "b (i j) c -> b c i j", j=columns), laid_out(images)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        draw_normal(module.weight, 0.0, STD)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Conv2d):
        nn.init.dirac_(module.weight)
        if module.bias is not None:
            module.bias.zero_()
