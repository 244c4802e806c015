"""Index backpropagation: every entry gets a gradient at every step, through the softmax over codes.

Source: arXiv 2412.02692, section 3.2, equations 4 to 7.
Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j vectors.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    rows_per_block,
)
from taming_dist.ranges import check_ranges, ranged


@dataclasses.dataclass
class IndexQuantizerConfig(QuantizerConfig):
    """`beta` of the commitment term; `entropy_weight` of E[H(q(z))] - `diversity` * H(E[q(z)]),
    with q(c|z) = softmax(z.c / `temperature`)."""

    name: str = "ibq"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1)
    beta: float = ranged(0.25, at_least=0, compared=False)
    entropy_weight: float = ranged(0.05, at_least=0, compared=False)
    diversity: float = ranged(1.0, at_least=0, compared=False)
    temperature: float = ranged(0.01, above=0, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")


class Chosen(NamedTuple):
    """Of a block of n vectors: codes; entries, with a gradient to the chosen entries only; z_q, the
    same values with a gradient to all of them; the sum of the entropies of q(c|z), and that of q.
    """

    codes: Int64[Tensor, "n"]
    entries: Float32[Tensor, "n d"]
    z_q: Float32[Tensor, "n d"]
    entropy: Float32[Tensor, ""]
    mass: Float32[Tensor, "K"]


class IndexCodebook(nn.Module):
    """The entries; the weight is used in this module's own forward, where ZeRO-3 has it.

    The N x K matrix is taken in blocks of rows, which are computed again in the backward pass
    instead of being kept.
    """

    def __init__(self, codes: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))

    def forward(
        self,
        z: Float32[Tensor, "N d"] | None,
        codes: Int64[Tensor, "*size"] | None = None,
        codes_only: bool = False,
    ) -> Chosen | Int64[Tensor, "N"] | Float32[Tensor, "*size d"]:
        """Vectors -> what is chosen for them, or their codes only; or codes -> their entries."""
        if codes is not None:
            return F.embedding(codes, self.weight)
        assert z is not None
        parts = z.split(rows_per_block(len(self.weight)))
        if codes_only:
            return torch.cat([(part @ self.weight.T).argmax(1) for part in parts])
        blocks = [
            checkpoint(self._choose, part, self.weight, use_reentrant=False) for part in parts
        ]
        codes, entries, z_q = (torch.cat(part) for part in list(zip(*blocks, strict=True))[:3])
        return Chosen(
            codes,
            entries,
            z_q,
            torch.stack([block.entropy for block in blocks]).sum(),
            torch.stack([block.mass for block in blocks]).sum(0),
        )

    def _choose(self, z: Float32[Tensor, "n d"], weight: Float32[Tensor, "K d"]) -> Chosen:
        logits = z @ weight.T
        p = logits.softmax(1)
        codes = logits.detach().argmax(1)
        entries = F.embedding(codes, weight)
        # zero in value; one-hot - sg[p] + p in gradient (equation 5)
        z_q = entries + (p - p.detach()) @ weight
        log_q = (logits / self.temperature).log_softmax(1)
        q = log_q.exp()
        return Chosen(codes, entries, z_q, -(q * log_q).sum(), q.sum(0))


class IndexQuantizer(EntropyQuantizer):
    """The code with the largest inner product; the gradient of z_q goes back through the softmax
    over all codes to z and to every entry."""

    def __init__(self, config: IndexQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim, self.beta = config.codes, config.dim, config.beta
        self.entropy_weight, self.diversity = config.entropy_weight, config.diversity
        self.embedding = IndexCodebook(config.codes, config.dim, config.temperature)

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            flat = as_vectors(z32)
            chosen = self.embedding(flat)
            loss = (
                F.mse_loss(chosen.z_q, flat)
                + F.mse_loss(flat, chosen.entries.detach())
                + self.beta * F.mse_loss(chosen.entries, flat.detach())
            )
            if self.training:
                n = len(flat)
                loss = loss + self.entropy_term(chosen.entropy / n, chosen.mass / n)
            return Quantized(
                z_q=as_grid(chosen.z_q, z),
                codes=as_code_grid(chosen.codes, z),
                loss=loss,
                statistics=Statistics(count(chosen.codes, self.vocabulary)),
            )

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
        return as_code_grid(self.embedding(as_vectors(z), codes_only=True), z)

    def lookup(self, codes: Int64[Tensor, "b i j"]) -> Float32[Tensor, "b d i j"]:
        return rearrange(self.embedding(None, codes), "b i j d -> b d i j")
