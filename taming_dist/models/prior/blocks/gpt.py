"""The paper's block, that of minGPT."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.models.prior.blocks.interface import Around, Block, BlockSizes


@dataclass
class GPTBlockConfig:
    """The original's block; it has no keys of its own."""

    name: str = "gpt"


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.causal = sizes.heads, sizes.causal
        self.dropout = sizes.dropout_attention
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b t c"]:
        """With a cache, x continues the positions in it."""
        query, key, value = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if around.cache is not None:
            key, value = around.cache.extend(around.layer, key, value)
        # A single position may see everything before it: only a longer piece needs the mask.
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and query.shape[2] > 1,
        )
        return self.proj(out.transpose(1, 2).flatten(2))


class GPTBlock(Block):
    """Pre-norm residual block: attention, then a perceptron of four times the width.

    Source: the original implementation (minGPT), whose parameter names it has.
    """

    def __init__(self, sizes: BlockSizes, config: GPTBlockConfig) -> None:
        super().__init__()
        width = sizes.width
        self.cached = (sizes.heads, width // sizes.heads)
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = Attention(sizes)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(sizes.dropout_residual)

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b t c"]:
        x = x + self.dropout(self.attn(self.ln1(x), around))
        return x + self.dropout(self.mlp(self.ln2(x)))
