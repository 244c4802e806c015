"""In which precision a transformer that is sampled from computes.

Legend: b images, n tokens, t of them, v vocabulary.
"""

import copy

import torch
from torch import Tensor, nn

from taming_dist.models.prior.blocks import KVCache
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import Network
from taming_dist.models.prior.transformer import Transformer

PRECISIONS = ("fp32", "bf16")


def in_bf16(transformer: Transformer) -> Transformer:
    """Return a copy to be sampled from whose linear layers are bf16, cast once. `network_of` it
    computes as training with `engine.precision=bf16` does."""
    half = copy.deepcopy(transformer).eval()
    for module in half.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return half


def network_of(transformer: Transformer) -> Network:
    """Return what to sample from: a transformer as it is, or autocast if it is `in_bf16`."""
    is_half = transformer.head.weight.dtype == torch.bfloat16
    return Autocast(transformer, transformer.device) if is_half else transformer


class Autocast:
    """A network in bf16 on a device."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network, self.device = network, device

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Return logits [b, n, v] of all tokens [b, n]."""
        with self._autocast():
            return self.network(tokens, prefix)

    def begin(
        self, prefix: Prefix, tokens: Tensor | None = None, once: bool = False
    ) -> tuple[Tensor, KVCache]:
        """Return logits [b, v] of the code after tokens [b, t], and the cache."""
        with self._autocast():
            return self.network.begin(prefix, tokens, once)

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return logits [b, v] of the next code after tokens [b, t] more."""
        with self._autocast():
            return self.network.step(tokens, cache)

    def several(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return logits [b, u, v] of all codes that come next after an image's tokens [b, t]."""
        with self._autocast():
            return self.network.several(tokens, cache)

    def _autocast(self) -> torch.autocast:
        # a recorded step must not remember what was cast, and nothing large is left to be
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
