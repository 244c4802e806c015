"""The block of LlamaGen, a Llama for images: RMSNorm, SwiGLU, rotary positions, no biases.

Source: arXiv 2406.06525, section 2.2.1, and its implementation for sizes and first values (all
weights normal of 0.02, the head zero; what is added to the residual is not scaled down).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.prior.blocks.adaptive import AdaptiveNorm
from taming_dist.models.prior.blocks.interface import BlockSizes
from taming_dist.models.prior.blocks.prenorm import Attention, PreNormBlock
from taming_dist.models.prior.blocks.rotary import rotations

EPS = 1e-5
MULTIPLE = 256


@dataclass
class LlamaBlockConfig:
    """LlamaGen's block, and two options that it does not have.

    `qk_norm`: RMSNorm of queries and keys, which keeps the logits of attention in range in bf16.
    `adaptive`: norms that the condition moves, beside its prefix.
    """

    qk_norm: bool = True
    adaptive: bool = False
    name: str = "llama"


class SwiGLU(nn.Module):
    """A gated perceptron of 8/3 times the width, rounded up to a multiple of 256.

    Source: arXiv 2002.05202, equation 6.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-(8 * width // 3) // MULTIPLE) * MULTIPLE
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LlamaBlock(PreNormBlock):
    """Positions in the image are told by rotations alone, and the prefix is not rotated."""

    learned_positions = False
    zero_head = True

    def __init__(self, sizes: BlockSizes, config: LlamaBlockConfig) -> None:
        head_width = sizes.width // sizes.heads
        norms = (nn.RMSNorm(head_width, EPS), nn.RMSNorm(head_width, EPS))
        super().__init__(
            sizes,
            (nn.RMSNorm(sizes.width, EPS), nn.RMSNorm(sizes.width, EPS)),
            Attention(sizes, bias=False, norms=norms if config.qk_norm else None),
            SwiGLU(sizes.width),
            config.adaptive,
        )

    @classmethod
    def check(cls, sizes: BlockSizes, config: LlamaBlockConfig) -> None:
        head_width = sizes.width // sizes.heads
        if head_width % 4:
            raise UserError(
                f"model.heads: {sizes.heads} heads of width={sizes.width} are {head_width} wide, "
                f"but those of model/block=llama need a multiple of 4"
            )

    @classmethod
    def rotation(
        cls, sizes: BlockSizes, config: LlamaBlockConfig, places: Int64[Tensor, "*b t"]
    ) -> Float32[Tensor, "*b t r"]:
        return rotations(places, sizes.grid[1], sizes.width // sizes.heads)

    @classmethod
    def last_norm(cls, sizes: BlockSizes, config: LlamaBlockConfig) -> nn.Module:
        norm = nn.RMSNorm(sizes.width, EPS)
        return AdaptiveNorm(norm, sizes.width) if config.adaptive else norm
