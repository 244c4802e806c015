"""The block of RAR: a ViT's, with norms that the condition moves.

Source: arXiv 2411.00776, section 4.1, and its implementation. There each position adds an embedding
of its own to the condition before it moves the norms; here the condition alone does, which takes a
third off a block's FLOPs. What the position is told by stands at the input (`pos_emb`, and
`target_emb` with the order `rar`).
"""

from dataclasses import dataclass

from torch import nn

from taming_dist.models.prior.blocks.adaptive import AdaptiveNorm
from taming_dist.models.prior.blocks.interface import BlockSizes
from taming_dist.models.prior.blocks.prenorm import Attention, PreNormBlock

EPS = 1e-6


@dataclass
class RARBlockConfig:
    """RAR's block; it has no keys of its own."""

    name: str = "rar"


class RARBlock(PreNormBlock):
    """LayerNorm, also of queries and keys; GELU in a perceptron of four times the width."""

    def __init__(self, sizes: BlockSizes, config: RARBlockConfig) -> None:
        width, head_width = sizes.width, sizes.width // sizes.heads
        norms = (nn.LayerNorm(head_width, EPS), nn.LayerNorm(head_width, EPS))
        super().__init__(
            sizes,
            (nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)),
            Attention(sizes, bias=True, norms=norms),
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            adaptive=True,
        )

    @classmethod
    def last_norm(cls, sizes: BlockSizes, config: RARBlockConfig) -> nn.Module:
        return AdaptiveNorm(nn.LayerNorm(sizes.width, EPS), sizes.width)
