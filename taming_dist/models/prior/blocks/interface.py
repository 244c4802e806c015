"""What a block of the transformer is, what it is told, and the cache of its keys and values.

Legend: b batch, t positions, c width, d width of a head.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Int64
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


class Around(NamedTuple):
    """What a block is told beside x.

    `rotation`: what the kind's `rotation` gave for the positions of x, the same for all images or
    one for each; `signal`: the mean of the prefix's embeddings, for kinds whose norms it moves;
    `cache`: the positions before x, none without it; `layer`: which of its layers is the block's;
    `mask`: what is added to the scores of attention over the cache (None: nothing, see `attend`).
    """

    rotation: Float[Tensor, "*b t r"] | None = None
    signal: Float[Tensor, "b c"] | None = None
    cache: "KVCache | None" = None
    layer: int = 0
    mask: Float[Tensor, "t s"] | None = None


class KVCache:
    """Keys and values of the positions read so far, in memory that is taken once.

    `keys` and `values` are [layers, b, heads, positions, d]; `length` positions count, of which the
    first `prefix` are the condition's. `around`: what all positions are told (`Around`); `learned`
    [positions, c]: what is learned of each, which is added to its embedding. `again`: the
    embeddings [b, length, c] of all so far, while they see later ones (`Block.unmasked`), so that
    what is cached changes with each that comes; None after.
    """

    def __init__(
        self,
        keys: Float[Tensor, "layers b heads positions d"],
        values: Float[Tensor, "layers b heads positions d"],
        learned: Float[Tensor, "positions c"],
        around: Around,
        prefix: int,
    ) -> None:
        self.keys, self.values = keys, values
        self.learned, self.around, self.prefix = learned, around, prefix
        self.length = 0
        self.again: Tensor | None = None

    def extend(
        self,
        layer: int,
        key: Float[Tensor, "b heads t d"],
        value: Float[Tensor, "b heads t d"],
    ) -> tuple[Float[Tensor, "b heads end d"], Float[Tensor, "b heads end d"]]:
        """Write one layer's keys and values after those that count; return all to be read."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def next(self, table: Float[Tensor, "p *r"], count: int = 1) -> Float[Tensor, "{count} *r"]:
        """Return the rows of a table that has one a position, for the next positions."""
        return table[self.length : self.length + count]

    def mask(self) -> Float[Tensor, "t s"] | None:
        """Return `Around.mask` of the next positions."""
        return None

    def advance(self, count: int) -> None:
        """Count so many positions more, which have been written."""
        self.length += count


class Block(nn.Module):
    """One layer, made from `BlockSizes` and the config of its kind.

    `learned_positions`: whether the transformer adds a learned embedding of each position to what
    the first block reads; without, only those of a prefix of several positions have one.
    `zero_head`: whether the logits start at zero. `adaptive`: whether the block has norms that the
    condition moves. `cached`: heads and width of each in the cache.
    """

    learned_positions: ClassVar[bool] = True
    zero_head: ClassVar[bool] = False
    adaptive: bool = False
    cached: tuple[int, int]

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b t c"]:
        """With a cache, x continues the positions in it."""
        raise NotImplementedError

    @classmethod
    def check(cls, sizes: BlockSizes, config: Any) -> None:
        """Raise a UserError, naming the key, if the sizes do not fit the kind."""

    @classmethod
    def rotation(
        cls, sizes: BlockSizes, config: Any, places: Int64[Tensor, "*b t"]
    ) -> Float[Tensor, "*b t r"] | None:
        """Return what tells the blocks where positions are, made once for all layers; None: only
        learned positions do. `places`: the place of each in the grid, row by row, -1 in the
        prefix."""
        return None

    @classmethod
    def unmasked(cls, config: Any) -> int:
        """Return how many of the first positions see each other whatever their order."""
        return 0

    @classmethod
    def last_norm(cls, sizes: BlockSizes, config: Any) -> nn.Module:
        """Return what stands between the last block and the logits; it is called with x, and with
        the signal too if the blocks are adaptive."""
        return nn.LayerNorm(sizes.width)
