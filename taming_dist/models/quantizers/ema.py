"""Vector quantisation with a codebook that follows the data as a moving average.

Source: arXiv 1711.00937, appendix A, equations 6 to 8.
Legend: b batch, d latent channels, i j latent grid, K codes.
"""

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor

from taming_dist.models.quantizers.interface import (
    GRADIENTS,
    MOST_CHANNELS,
    MOST_CODES,
    STRAIGHT_THROUGH,
    Quantized,
    Quantizer,
    QuantizerConfig,
    ReplaceRows,
    Statistics,
    as_code_grid,
    as_grid,
    as_vectors,
    count,
    full_precision,
    nearest,
)
from taming_dist.models.quantizers.restarts import (
    Start,
    candidates,
    check_start,
    dead_codes,
    replacements,
)
from taming_dist.ranges import check_choice, check_ranges, marked, ranged


@dataclasses.dataclass
class EMAQuantizerConfig(QuantizerConfig):
    """Codebook as a moving average of the latents assigned to each code, with dead codes restarted.

    `decay` is per optimizer step. `initial`: random, or data or kmeans from the first global batch.
    A code that is chosen less than `revive_below` times as often as it would be if all codes were
    chosen alike takes the place of a latent of the present batch; 0: never. `gradient`: as that of
    `VectorQuantizerConfig`.
    """

    name: str = "ema"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    beta: float = ranged(0.25, at_least=0, compared=False)
    decay: float = ranged(0.99, at_least=0, below=1, compared=False)
    normalized: bool = True
    initial: str = marked("random", compared=False)
    revive_below: float = ranged(0.05, at_least=0, below=1, compared=False)
    gradient: str = marked(STRAIGHT_THROUGH, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        check_start(self.initial)
        check_choice("model.quantizer.gradient", self.gradient, GRADIENTS)


class EMAQuantizer(Quantizer):
    """Entries follow the mean of their latents; only the commitment term is learned by gradient.

    The entries are buffers, changed by `update` alone, from statistics that the caller has added up
    over ranks: so they are the same everywhere.
    """

    def __init__(self, config: EMAQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim, self.beta = config.codes, config.dim, config.beta
        self.normalized, self.decay = config.normalized, config.decay
        self.passed = GRADIENTS[config.gradient]
        self.revive_below = config.revive_below
        self.start = Start(config.initial)
        entries = torch.randn(config.codes, config.dim)
        self.register_buffer(
            "entries", F.normalize(entries, dim=-1) if self.normalized else entries
        )
        self.register_buffer("cluster_size", torch.ones(config.codes))
        self.register_buffer("cluster_sum", self.entries.clone())
        self.entries: Tensor
        self.cluster_size: Tensor
        self.cluster_sum: Tensor

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            flat = as_vectors(z32, self.normalized)
            codes = nearest(flat.detach(), self.entries, self.lean)
            entries = F.embedding(codes, self.entries)
            return Quantized(
                z_q=as_grid(self.passed(flat, entries), z),
                codes=as_code_grid(codes, z),
                loss=self.beta * F.mse_loss(flat, entries),
                statistics=self._statistics(flat.detach().view(len(z), -1, self.dim), codes),
            )

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
        return as_code_grid(nearest(as_vectors(z, self.normalized), self.entries, self.lean), z)

    def _statistics(
        self, latents: Float32[Tensor, "b n d"], codes: Int64[Tensor, "b*n"]
    ) -> Statistics:
        counts = count(codes, self.vocabulary)
        if not self.training:
            return Statistics(counts)
        sums = torch.zeros_like(self.entries).index_add_(0, codes, latents.flatten(0, 1))
        return Statistics(counts, sums, candidates(latents, self.start.pending()))

    def lookup(self, codes: Int64[Tensor, "b i j"]) -> Float32[Tensor, "b d i j"]:
        return rearrange(F.embedding(codes, self.entries), "b i j d -> b d i j")

    @torch.no_grad()
    def update(
        self, statistics: Statistics, generator: torch.Generator, replace_rows: ReplaceRows
    ) -> int | Int64[Tensor, ""]:
        """Move the averages (equations 6 to 8), then restart dead codes."""
        assert statistics.sums is not None
        assert statistics.candidates is not None
        pool = statistics.candidates.flatten(0, 1)
        if self.start.pending():
            first = self.first_entries(pool, generator)
            self._place(torch.ones_like(self.cluster_size).bool(), first, statistics.counts.mean())
            return 0
        self.cluster_size.lerp_(statistics.counts, 1 - self.decay)
        self.cluster_sum.lerp_(statistics.sums, 1 - self.decay)
        means = self.cluster_sum / self.cluster_size.clamp(min=1e-5)[:, None]
        self.entries.copy_(F.normalize(means, dim=-1) if self.normalized else means)
        dead = dead_codes(self.cluster_size, self.revive_below, len(pool))
        self._place(dead, replacements(pool, dead, generator), self.cluster_size.mean())
        return dead.sum()

    def first_entries(
        self, pool: Float32[Tensor, "P d"], generator: torch.Generator
    ) -> Float32[Tensor, "K d"]:
        """The codebook at its start, from latents of the first global batch."""
        return self.start.entries(pool, self.vocabulary, self.normalized, generator)

    def _place(self, codes: Tensor, entries: Tensor, size: Tensor) -> None:
        """Put entries [K,d] in the places of the codes whose flag is set [K]. The averages start
        again with them, as if each had been chosen `size` times per step, or the next update would
        undo it."""
        rows = codes[:, None]
        self.entries.copy_(torch.where(rows, entries, self.entries))
        self.cluster_size.copy_(torch.where(codes, size, self.cluster_size))
        self.cluster_sum.copy_(torch.where(rows, size * entries, self.cluster_sum))
