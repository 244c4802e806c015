"""What a block is told beside x, and the keys and values of the positions read so far.

Legend: b batch, t positions of a step, s positions of the cache, c width, d width of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Around(NamedTuple):
    """What a block is told beside x.

    `rotation`: what the kind's `rotation` gave for the positions of x, the same for all images or
    one for each; `signal`: the mean of the prefix's embeddings, for kinds whose norms it moves;
    `cache`: the positions before x, none without it; `layer`: which of its layers is the block's;
    `mask`: what attention sees of the positions, or what is added to its scores (None: `attend`);
    `last`: whether only the last position's answer is wanted.
    """

    rotation: Float[Tensor, "*b t r"] | None = None
    signal: Float[Tensor, "b c"] | None = None
    cache: "KVCache | None" = None
    layer: int = 0
    mask: Float[Tensor, "*b t s"] | Bool[Tensor, "t s"] | None = None
    last: bool = False

    def of_last(self) -> "Around":
        """Return it where only the last position's answer is wanted."""
        return self._replace(mask=None if self.mask is None else self.mask[..., -1:, :], last=True)

    def wanted(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b u c"]:
        """Return the positions of x whose answers are wanted."""
        return x[:, -1:] if self.last else x


class KVCache:
    """Keys and values of the positions read so far, in memory that is taken once.

    `keys` and `values` are those of each layer, [b, heads, s, d]; `length` positions count, of
    which the first `prefix` are the condition's. `around`: what all positions are told (`Around`);
    `learned` [p, c]: what is learned of each, which is added to its embedding. `again`: the
    embeddings [b, length, c] of all so far, while they see later ones (`Block.unmasked`), so that
    what is cached changes with each that comes; None after.
    """

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "b heads s d"]],
        values: Sequence[Float[Tensor, "b heads s d"]],
        learned: Float[Tensor, "p c"],
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
        keys, values, end = self.keys[layer], self.values[layer], self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def next(self, table: Float[Tensor, "p r"], count: int = 1) -> Float[Tensor, "*b {count} r"]:
        """Return the rows of a table that has one a position, for the next positions."""
        return table[self.length : self.length + count]

    def of_token(self, table: Float[Tensor, "n"]) -> Float[Tensor, "b"]:
        """Return the number in a table that has one a token of the image, for the token that comes
        next: that of each image, or one for all."""
        at = self.length - self.prefix
        return table[at : at + 1]

    def mask(self) -> Float[Tensor, "*b t s"] | None:
        """Return `Around.mask` of the next positions."""
        return None

    def advance(self, count: int) -> None:
        """Count so many positions more, which have been written."""
        self.length += count


class ReadOnce(KVCache):
    """Stands for a cache where no step follows: nothing is copied to it, and it has no memory."""

    def extend(
        self,
        layer: int,
        key: Float[Tensor, "b heads t d"],
        value: Float[Tensor, "b heads t d"],
    ) -> tuple[Float[Tensor, "b heads t d"], Float[Tensor, "b heads t d"]]:
        return key, value


class StaticCache(KVCache):
    """A cache that is read whole at every step, and counts on the device.

    All shapes and addresses then stay as they are, and the host knows nothing that changes: a step
    of one position can be recorded in a CUDA graph. `position` [1]: how many positions count. It
    takes over the memory of the cache that it is made from, which must not change any more with
    what comes (`again` is None).
    """

    def __init__(self, begun: KVCache) -> None:
        assert begun.again is None
        super().__init__(begun.keys, begun.values, begun.learned, begun.around, begun.prefix)
        self.length = begun.length  # when it was made
        first = begun.keys[0]
        self.position = torch.full((1,), begun.length, device=first.device)
        self._places = torch.arange(first.shape[2], device=first.device)
        self._open = first.new_zeros(1, len(self._places))
        # what is masked counts nothing, but times nothing of it may be infinite
        for mine in (*self.keys, *self.values):
            mine[:, :, begun.length :].zero_()

    def load(self, begun: KVCache) -> None:
        """Take over what another cache of the same shapes has read."""
        assert begun.again is None
        seen = slice(begun.length)
        pairs = [(self.learned, begun.learned)]
        for kept, others in ((self.keys, begun.keys), (self.values, begun.values)):
            layers = zip(kept, others, strict=True)
            pairs += [(mine[:, :, seen], other[:, :, seen]) for mine, other in layers]
        for mine, other in zip(self.around, begun.around, strict=True):
            if isinstance(mine, Tensor) and isinstance(other, Tensor):
                pairs.append((mine, other))
        for mine, other in pairs:
            mine.copy_(other)
        self.position.fill_(begun.length)

    def extend(
        self,
        layer: int,
        key: Float[Tensor, "b heads 1 d"],
        value: Float[Tensor, "b heads 1 d"],
    ) -> tuple[Float[Tensor, "b heads s d"], Float[Tensor, "b heads s d"]]:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.position, key.to(keys.dtype))
        values.index_copy_(2, self.position, value.to(values.dtype))
        return keys, values

    def next(self, table: Float[Tensor, "p r"], count: int = 1) -> Float[Tensor, "1 r"]:
        assert count == 1
        return table.index_select(0, self.position)

    def of_token(self, table: Float[Tensor, "n"]) -> Float[Tensor, "1"]:
        return table.index_select(0, self.position - self.prefix)

    def mask(self) -> Float[Tensor, "1 s"]:
        return self._open.masked_fill(self._places > self.position, -torch.inf)

    def advance(self, count: int) -> None:
        self.position.add_(count)
