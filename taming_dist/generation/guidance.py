"""Classifier-free guidance: logits with a condition, pushed away from those without one.

Legend: b images, n tokens, v vocabulary.
"""

from torch import Tensor

from taming_dist.models.prior.blocks import KVCache
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import Network


class Guided:
    """A transformer whose logits are l_0 + scale (l_c - l_0): l_c with, l_0 without the condition.

    Both are read in one batch of twice the size, and put together in fp32. Source: arXiv
    2207.12598, equation 6, with scale 1 + w.
    """

    def __init__(self, network: Network, scale: float) -> None:
        self.network, self.scale = network, scale

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Return logits [b, n, v] of all tokens [b, n]."""
        return self._guided(self.network(tokens.repeat(2, 1), prefix.beside_null()))

    def begin(self, prefix: Prefix, tokens: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Return logits [b, v] of the code after tokens [b, t], and the cache of both halves."""
        both = None if tokens is None else tokens.repeat(2, 1)
        logits, cache = self.network.begin(prefix.beside_null(), both)
        return self._guided(logits), cache

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return logits [b, v] of the next code after tokens [b, t] more."""
        return self._guided(self.network.step(tokens.repeat(2, 1), cache))

    def _guided(self, logits: Tensor) -> Tensor:
        conditional, null = logits.float().chunk(2)
        return null + self.scale * (conditional - null)
