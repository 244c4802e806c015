"""Codes as samples of a categorical distribution, relaxed by Gumbel noise.

Source: arXiv 1611.01144 and 2102.12092 (section 2.1), as in the f8 models of 2012.09841's authors.
The distribution over all codes is what is learned: N x K numbers are held, there is no way around.
Legend: b batch, d latent channels, i j latent grid, K codes.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.models.quantizers.interface import (
    MOST_CHANNELS,
    MOST_CODES,
    Quantized,
    Quantizer,
    QuantizerConfig,
    Statistics,
    count,
    full_precision,
)
from taming_dist.ranges import check_ranges, ranged


@dataclasses.dataclass
class GumbelQuantizerConfig(QuantizerConfig):
    """`kl_weight` of the term that keeps the distribution near the uniform one; `temperature` falls
    on a half cosine to `final_temperature` at the end of the run."""

    name: str = "gumbel"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    kl_weight: float = ranged(1e-8, at_least=0, compared=False)
    temperature: float = ranged(0.9, above=0, compared=False)
    final_temperature: float = ranged(1e-6, above=0, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")


class Mixture(nn.Module):
    """The entries; the weight is used in this module's own forward, where ZeRO-3 has it."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, dim))

    def forward(
        self,
        shares: Float32[Tensor, "b K i j"] | None,
        codes: Int64[Tensor, "b i j"] | None = None,
    ) -> Float32[Tensor, "b d i j"]:
        """Shares of the entries (or codes) -> the entries mixed in these shares."""
        if codes is not None:
            return rearrange(F.embedding(codes, self.weight), "b i j d -> b d i j")
        assert shares is not None
        return torch.einsum("b k i j, k d -> b d i j", shares, self.weight)


class GumbelQuantizer(Quantizer):
    """In training a code is drawn: its entry goes on, the gradient is that of the relaxed sample.
    In evaluation it is the most probable code, without noise, so that tokens are reproducible."""

    def __init__(self, config: GumbelQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim = config.codes, config.dim
        self.kl_weight = config.kl_weight
        self.first_temperature, self.final_temperature = (
            config.temperature,
            config.final_temperature,
        )
        self.temperature = config.temperature
        self.proj = nn.Conv2d(config.dim, config.codes, 1)
        self.embed = Mixture(config.codes, config.dim)

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            logits = self.proj(z32)
            if self.training:
                shares = F.gumbel_softmax(logits, tau=self.temperature, dim=1, hard=True)
                codes = shares.argmax(1)
                z_q = self.embed(shares)
            else:
                codes = logits.argmax(1)
                z_q = self.embed(None, codes)
            statistics = Statistics(count(codes, self.vocabulary))
            return Quantized(z_q, codes, self.kl_weight * self._divergence(logits), statistics)

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
        return self.proj(z).argmax(1)

    def _divergence(self, logits: Float32[Tensor, "b K i j"]) -> Float32[Tensor, ""]:
        """KL(q(k|z) || uniform), the mean over all positions."""
        log_q = F.log_softmax(logits, dim=1)
        return (log_q.exp() * (log_q + math.log(self.vocabulary))).sum(1).mean()

    def lookup(self, codes: Int64[Tensor, "b i j"]) -> Float32[Tensor, "b d i j"]:
        return self.embed(None, codes)

    def anneal(self, progress: float) -> dict[str, float]:
        """The temperature of the next step."""
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        span = self.first_temperature - self.final_temperature
        self.temperature = self.final_temperature + span * share
        return {"temperature": self.temperature}
