"""Binary spherical quantisation: the signs of a latent on the unit sphere are the bits of its code.

Source: arXiv 2406.07548, section 4, and its authors' code for the weights.
Legend: d latent channels (= bits), N vectors.
"""

import dataclasses

import torch
from jaxtyping import Float32
from torch import Tensor

from taming_dist.models.quantizers.binary import BinaryQuantizer, BinaryQuantizerConfig
from taming_dist.ranges import ranged


@dataclasses.dataclass
class BSQuantizerConfig(BinaryQuantizerConfig):
    """The keys are those of `BinaryQuantizerConfig`, with the weights of its authors: without a
    commitment term, as on the sphere an entry is never far, and softer probabilities."""

    name: str = "bsq"
    beta: float = ranged(0.0, at_least=0, compared=False)
    temperature: float = ranged(1.0, above=0, compared=False)


class BSQuantizer(BinaryQuantizer):
    """Entries are {-1, 1}^d / sqrt(d), on the sphere as the latents. The entropy over all vectors
    is taken bit by bit as if these were independent, which is never less than the true one."""

    normalized = True

    def __init__(self, config: BSQuantizerConfig) -> None:
        super().__init__(config)
        self.side = self.dim**-0.5

    def _mean(self, on: Float32[Tensor, "N d"]) -> Float32[Tensor, "2 d"]:
        """The probabilities of each bit to be off and on: d numbers instead of 2^d."""
        p = on.mean(0)
        return torch.stack([1 - p, p])
