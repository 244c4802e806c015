"""The paper's block, that of minGPT."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.models.joined import JoinedLinear
from taming_dist.models.prior.blocks.attention import attend
from taming_dist.models.prior.blocks.cache import Around
from taming_dist.models.prior.blocks.interface import Block, BlockSizes
from taming_dist.models.quick import Quick
from taming_dist.ranges import check_ranges, ranged


@dataclass
class GPTBlockConfig:
    """The original's block.

    `unmasked`: how many positions, from the first of the prefix on, see each other whatever their
    order (the original's `n_unmasked`); it is meant for the length of the prefix.
    """

    unmasked: int = ranged(0, at_least=0)
    name: str = "gpt"

    def __post_init__(self) -> None:
        check_ranges(self, "model.block")


class Attention(Quick):
    """Multi-head self-attention; `unmasked` as in `GPTBlockConfig`."""

    def __init__(self, sizes: BlockSizes, unmasked: int = 0) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.causal, self.unmasked = sizes.heads, sizes.causal, unmasked
        self.dropout = sizes.dropout_attention
        self.qkv = JoinedLinear(width, ("key", "query", "value"))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b u c"]:
        """With a cache, x continues the positions in it."""
        key, query, value = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in self.qkv(x, around.wanted(x), x)
        )
        if around.cache is not None:
            key, value = around.cache.extend(around.layer, key, value)
        dropout = self.dropout if self.training else 0.0
        read = attend(
            query, key, value, self.causal, dropout, self.unmasked, around.mask, self.fast
        )
        return self.proj(read)


class GPTBlock(Block):
    """Pre-norm residual block: attention, then a perceptron of four times the width.

    Source: the original implementation (minGPT), whose names its stored tensors have.
    """

    def __init__(self, sizes: BlockSizes, config: GPTBlockConfig) -> None:
        super().__init__()
        width = sizes.width
        self.cached = (sizes.heads, width // sizes.heads)
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = Attention(sizes, config.unmasked)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(sizes.dropout_residual)

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b u c"]:
        x = around.wanted(x) + self.dropout(self.attn(self.ln1(x), around))
        return x + self.dropout(self.mlp(self.ln2(x)))

    @classmethod
    def unmasked(cls, config: GPTBlockConfig) -> int:
        return config.unmasked
