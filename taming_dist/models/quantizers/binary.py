"""Quantizers whose code is the signs of the channels: what `lfq` and `bsq` have in common.

Legend: b batch, d latent channels (= bits), i j latent grid, K = 2^d codes, N = b*i*j vectors.
"""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor

from taming_dist.models.quantizers.entropy import EntropyQuantizer
from taming_dist.models.quantizers.interface import (
    MOST_CODES,
    Quantized,
    QuantizerConfig,
    Statistics,
    as_code_grid,
    as_grid,
    as_vectors,
    count,
    full_precision,
    straight_through,
)
from taming_dist.ranges import check_ranges, ranged

MOST_BITS = MOST_CODES.bit_length() - 1


@dataclasses.dataclass
class BinaryQuantizerConfig(QuantizerConfig):
    """2^`bits` codes. `entropy_weight` of E[H(q(z))] - `diversity` * H(E[q(z)]), with
    q(c|z) = softmax(2 z.c / `temperature`); `beta` of the commitment term."""

    whole = "its codes are combinations of levels"

    name: str = MISSING
    bits: int = ranged(MISSING, at_least=1, at_most=MOST_BITS)
    beta: float = ranged(0.25, at_least=0, compared=False)
    entropy_weight: float = ranged(0.1, at_least=0, compared=False)
    diversity: float = ranged(1.0, at_least=0, compared=False)
    temperature: float = ranged(0.01, above=0, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")

    @property
    def codes(self) -> int:
        return 2**self.bits

    @property
    def dim(self) -> int:
        return self.bits


class BinaryQuantizer(EntropyQuantizer):
    """Entries are the corners of a cube, {-side, side}^d; the nearest one has the signs of z.
    `normalized`: latents are put on the unit sphere first."""

    side = 1.0
    normalized = False

    def __init__(self, config: BinaryQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim, self.beta = config.codes, config.dim, config.beta
        self.entropy_weight, self.diversity = config.entropy_weight, config.diversity
        self.temperature = config.temperature

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            flat = as_vectors(z32, self.normalized)
            bits = flat > 0
            entries = self.side * (2.0 * bits - 1.0)
            codes = self._joined(bits, z)
            loss = self.beta * F.mse_loss(flat, entries)
            if self.training:
                loss = loss + self.entropy_term(*self._certainty(flat))
            return Quantized(
                z_q=as_grid(straight_through(flat, entries), z),
                codes=codes,
                loss=loss,
                statistics=Statistics(count(codes, self.vocabulary)),
            )

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
        return self._joined(as_vectors(z, self.normalized) > 0, z)

    def _joined(
        self, bits: Bool[Tensor, "N d"], z: Float[Tensor, "b d i j"]
    ) -> Int64[Tensor, "b i j"]:
        """Bits, the first one lowest -> codes, with the sizes of z."""
        places = torch.arange(self.dim, device=z.device)
        return as_code_grid((bits.long() << places).sum(-1), z)

    def _certainty(
        self, flat: Float32[Tensor, "N d"]
    ) -> tuple[Float32[Tensor, ""], Float32[Tensor, "..."]]:
        """E[H(q(z))], and the probabilities of the codes in E[q(z)].

        q factorises over the bits, with logits 4 side z / temperature, so that the first entropy is
        a sum over bits.
        """
        logits = 4 * self.side * flat / self.temperature
        on = torch.sigmoid(logits)
        of_each = (F.softplus(logits) - logits * on).sum(-1).mean()
        return of_each, self._mean(on)

    def _mean(self, on: Float32[Tensor, "N d"]) -> Float32[Tensor, "..."]:
        """The mean over vectors of q, from the probabilities of their bits: numbers of which
        `entropy` makes the entropy of that distribution."""
        raise NotImplementedError

    def lookup(self, codes: Int64[Tensor, "b i j"]) -> Float32[Tensor, "b d i j"]:
        bits = codes[:, None] >> torch.arange(self.dim, device=codes.device)[:, None, None]
        return self.side * (2 * (bits & 1) - 1).float()
