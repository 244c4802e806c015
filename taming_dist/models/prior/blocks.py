"""Blocks of the transformer, by the name that `model/block=` has.

A kind of block is a class with a config class, and one line in BLOCKS.
Legend: b batch, t positions, c width, d width of a head.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockSizes:
    """What a block is told of the transformer around it.

    `positions`: the most that it ever sees, of which the first `prefix` are the condition's and the
    rest those of the code grid `grid` [i, j], in the transformer's order. `causal`: no position
    sees a later one.
    """

    width: int
    heads: int
    dropout_attention: float
    dropout_residual: float
    causal: bool
    positions: int
    prefix: int
    grid: tuple[int, int]


class KVCache:
    """Keys and values of the positions read so far, in memory that is taken once.

    `keys` and `values` are [layers, b, heads, positions, d]; `length` positions count.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        positions: int,
        head_width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch, heads, positions, head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(
        self,
        layer: int,
        key: Float[Tensor, "b heads t d"],
        value: Float[Tensor, "b heads t d"],
    ) -> tuple[Float[Tensor, "b heads end d"], Float[Tensor, "b heads end d"]]:
        """Write one layer's keys and values after `length`; return all so far."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Block(nn.Module):
    """One layer, made from `BlockSizes` and the config of its kind.

    `learned_positions`: whether the transformer adds a learned embedding of each position to what
    the first block reads. A kind that has a notion of positions of its own (rotary, say) turns it
    off; its x begins at position `cache.length`, at 0 without a cache. `cached`: heads and width of
    each in the cache.
    """

    learned_positions: ClassVar[bool] = True
    cached: tuple[int, int]

    def forward(
        self, x: Float[Tensor, "b t c"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b t c"]:
        """With a cache, x continues the positions in it."""
        raise NotImplementedError

    @classmethod
    def last_norm(cls, sizes: BlockSizes) -> nn.Module:
        """Return what stands between the last block and the logits."""
        return nn.LayerNorm(sizes.width)


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

    def forward(
        self, x: Float[Tensor, "b t c"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b t c"]:
        """With a cache, x continues the positions in it."""
        query, key, value = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.extend(layer, key, value)
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

    def forward(
        self, x: Float[Tensor, "b t c"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b t c"]:
        x = x + self.dropout(self.attn(self.ln1(x), cache, layer))
        return x + self.dropout(self.mlp(self.ln2(x)))


# name in conf/model/block -> its config and its block; the first is the default
BLOCKS: dict[str, tuple[Any, type[Block]]] = {
    "gpt": (GPTBlockConfig, GPTBlock),
}
