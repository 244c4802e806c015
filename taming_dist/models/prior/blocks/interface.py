"""What a block of the transformer is.

Legend: b batch, t positions, c width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from taming_dist.models.prior.blocks.cache import Around


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

    def forward(self, x: Float[Tensor, "b t c"], around: Around) -> Float[Tensor, "b u c"]:
        """With a cache, x continues the positions in it; answers are those of `around.wanted`."""
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
