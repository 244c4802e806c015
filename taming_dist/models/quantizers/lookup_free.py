"""Lookup-free quantisation: the signs of the channels are the bits of the code.

Source: arXiv 2310.05737, section 3.2.
Legend: d latent channels (= bits), K = 2^d codes, N vectors.
"""

import dataclasses

import torch
from jaxtyping import Float32
from torch import Tensor

from taming_dist.models.quantizers.binary import BinaryQuantizer, BinaryQuantizerConfig


@dataclasses.dataclass
class LFQuantizerConfig(BinaryQuantizerConfig):
    """The keys are those of `BinaryQuantizerConfig`."""

    name: str = "lfq"


class LFQuantizer(BinaryQuantizer):
    """Entries are {-1, 1}^d, and the entropy over all vectors is exact."""

    def _mean(self, on: Float32[Tensor, "N d"]) -> Float32[Tensor, "K"]:
        """The product of two thin matrices, [2^(d/2),N] and [N,2^(d/2)]: no N x K numbers."""
        low, high = on.split([self.dim // 2, self.dim - self.dim // 2], dim=1)
        return (joint(high).T @ joint(low) / len(on)).flatten()


def joint(on: Float32[Tensor, "N k"]) -> Float32[Tensor, "N 2**k"]:
    """Probabilities of independent bits -> those of their combinations, where the first bit is the
    lowest of the index."""
    out = on.new_ones(len(on), 1)
    for p in on.unbind(1):
        p = p[:, None]
        out = torch.cat([out * (1 - p), out * p], dim=1)
    return out
