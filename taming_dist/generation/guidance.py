"""Classifier-free guidance: logits with a condition, pushed away from those without one.

Legend: b images, n tokens, t of them, v vocabulary.
"""

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

from taming_dist.models.prior.blocks import KVCache
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import Network, Scheme

# How far guidance is on its way from scale 1 (0) to its whole scale (1), of the share of an image's
# codes that are written, from 0 up to 1, and of a power. `linear`: arXiv 2301.00704, section 2.7;
# `cosine`: RAR, arXiv 2411.00776, whose power is that of its implementation.
SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda progress, power: torch.ones_like(progress),
    "linear": lambda progress, power: progress,
    "cosine": lambda progress, power: (1 - torch.cos(pi * progress**power)) / 2,
}


class Guided:
    """A transformer whose logits are l_0 + s_k (l_c - l_0): l_c with, l_0 without the condition.

    `scales` [n]: s_k is that of a code that is chosen when k of its image's are written. Both are
    read in one batch of twice the size, and put together in fp32. Source: arXiv 2207.12598,
    equation 6, with s = 1 + w.
    """

    def __init__(self, network: Network, scales: Tensor, scheme: Scheme) -> None:
        self.network, self.scales, self.scheme = network, scales, scheme

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Return logits [b, n, v] of all tokens [b, n]."""
        logits = self.network(tokens.repeat(2, 1), prefix.beside_null())
        written = self.scheme.written(tokens, logits.shape[-1])
        return guided(logits, self.scales[written.clamp(max=len(self.scales) - 1)])

    def begin(
        self, prefix: Prefix, tokens: Tensor | None = None, once: bool = False
    ) -> tuple[Tensor, KVCache]:
        """Return logits [b, v] of the code after tokens [b, t], and the cache of both halves."""
        both = None if tokens is None else tokens.repeat(2, 1)
        logits, cache = self.network.begin(prefix.beside_null(), both, once)
        return guided(logits, cache.of_token(self.scales)), cache

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return logits [b, v] of the next code after tokens [b, t] more."""
        logits = self.network.step(tokens.repeat(2, 1), cache)
        return guided(logits, cache.of_token(self.scales))

    def several(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return logits [b, u, v] of all codes that come next after an image's tokens [b, t]."""
        logits = self.network.several(tokens.repeat(2, 1), cache)
        return guided(logits, self.scales[tokens.shape[1]])


def guided(logits: Tensor, scales: Tensor) -> Tensor:
    """Return guided logits [b, *n, v] from those of both halves [2 b, *n, v] and scales that
    broadcast against [b, *n]; with scale 1 they are those with the condition, bit for bit."""
    conditional, null = logits.float().chunk(2)
    return torch.lerp(null, conditional, scales.unsqueeze(-1))
