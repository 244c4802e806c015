"""What the kinds of block of today share: attention with fused projections, and a pre-norm block
whose norms the condition may move.

Legend: b batch, t positions, c width, d width of a head.
"""

from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.models.prior.blocks.adaptive import Modulation, moved
from taming_dist.models.prior.blocks.attention import attend
from taming_dist.models.prior.blocks.cache import Around
from taming_dist.models.prior.blocks.interface import Block, BlockSizes
from taming_dist.models.prior.blocks.rotary import rotated
from taming_dist.models.quick import Quick


class Attention(Quick):
    """Multi-head self-attention: one projection gives queries, keys and values.

    `norms`: those of the queries and of the keys of each head (arXiv 2010.04245), if they have any.
    """

    def __init__(
        self, sizes: BlockSizes, bias: bool, norms: tuple[nn.Module, nn.Module] | None
    ) -> None:
        super().__init__()
        self.heads, self.causal = sizes.heads, sizes.causal
        self.dropout = sizes.dropout_attention
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=bias)
        self.proj = nn.Linear(sizes.width, sizes.width, bias=bias)
        self.query_norm: nn.Module | None
        self.key_norm: nn.Module | None
        self.query_norm, self.key_norm = norms or (None, None)

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b u c"]:
        """With a cache, x continues the positions in it."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query.float()), self.key_norm(key.float())
        if around.rotation is not None:
            query, key = rotated(query, around.rotation), rotated(key, around.rotation)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if around.last:
            query = query[:, :, -1:]
        if around.cache is not None:
            key, value = around.cache.extend(around.layer, key, value)
        dropout = self.dropout if self.training else 0.0
        read = attend(query, key, value, self.causal, dropout, mask=around.mask, fast=self.fast)
        return self.proj(read)


class PreNormBlock(Block):
    """x + attention(norm(x)), then x + perceptron(norm(x)).

    `adaptive`: the norms' answers are moved, and what is added to x is scaled, by the signal.
    """

    def __init__(
        self,
        sizes: BlockSizes,
        norms: tuple[nn.Module, nn.Module],
        attention: nn.Module,
        perceptron: nn.Module,
        adaptive: bool,
    ) -> None:
        super().__init__()
        self.cached = (sizes.heads, sizes.width // sizes.heads)
        self.ln1, self.ln2 = norms
        self.attn, self.mlp = attention, perceptron
        self.dropout = nn.Dropout(sizes.dropout_residual)
        self.adaptive = adaptive
        self.modulation = Modulation(sizes.width, 6) if adaptive else None

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b u c"]:
        if self.modulation is None:
            x = around.wanted(x) + self.dropout(self.attn(self.ln1(x), around))
            return x + self.dropout(self.mlp(self.ln2(x)))
        assert around.signal is not None
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(around.signal)
        read = self.attn(moved(self.ln1(x), shift1, scale1), around)
        x = around.wanted(x) + gate1 * self.dropout(read)
        return x + gate2 * self.dropout(self.mlp(moved(self.ln2(x), shift2, scale2)))
