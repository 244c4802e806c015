"""What stands before an image's tokens, as the transformer takes it: the condition of each image.

Legend: b images, m positions of a part, w width of its features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from taming_dist.copies import to_device

Part = Int64[Tensor, "b m"] | Float[Tensor, "b m w"]


@dataclass(frozen=True)
class Prefix:
    """The prefixes of b images.

    `parts`: one for each part of the condition, in its order: token ids [b, m], or features
    [b, m, w] that the transformer projects. `dropped` [b]: which images have the null prefix in
    place of theirs (None: none); see arXiv 2207.12598, section 3.2.
    """

    parts: tuple[Tensor, ...]
    dropped: Bool[Tensor, "b"] | None = None

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def length(self) -> int:
        """Positions of all parts together."""
        return sum(part.shape[1] for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parts[0].device

    def to(self, device: torch.device) -> "Prefix":
        """Return it on the device, without waiting for it."""
        return self.map(lambda part: to_device(part, device))

    def rows(self, chosen: slice) -> "Prefix":
        """Return the prefixes of some of the images."""
        return self.map(lambda part: part[chosen])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Prefix":
        """Return it with each of its tensors changed."""
        dropped = None if self.dropped is None else change(self.dropped)
        return Prefix(tuple(change(part) for part in self.parts), dropped)

    def dropping(self, dropped: Bool[Tensor, "b"]) -> "Prefix":
        """Return it with the null prefix for some of the images."""
        return replace(self, dropped=dropped)

    def beside_null(self) -> "Prefix":
        """Return 2 b prefixes: these, and the null prefix as many times."""
        parts = tuple(torch.cat([part, part]) for part in self.parts)
        null = torch.arange(2 * len(self), device=self.device) >= len(self)
        return Prefix(parts, null)


def as_prefix(prefix: Prefix | Part) -> Prefix:
    """Return a prefix; a tensor stands for the only part of one."""
    return prefix if isinstance(prefix, Prefix) else Prefix((prefix,))
