"""Vector quantisation with a codebook that is learned by gradient.

Source: arXiv 2012.09841, section 3.1, equations 2 to 4; l2-normalised codes: arXiv 2110.04627.
Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j vectors.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor, nn

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
    StaysFloat32,
    as_code_grid,
    as_grid,
    as_vectors,
    count,
    full_precision,
    nearest,
)
from taming_dist.models.quantizers.restarts import (
    Start,
    Usage,
    candidates,
    check_start,
    replacements,
)
from taming_dist.ranges import check_choice, check_ranges, marked, ranged


class Entries(StaysFloat32):
    """What has `entries`; the weight is used in this module's own forward, where ZeRO-3 has it."""

    weight: nn.Parameter

    def entries(self) -> Float32[Tensor, "K d"]:
        raise NotImplementedError

    def forward(
        self, z: Float32[Tensor, "N d"] | None, codes: Int64[Tensor, "N"] | None = None
    ) -> tuple[Int64[Tensor, "N"], Float32[Tensor, "N d"]]:
        """Vectors (or codes) -> codes, their entries."""
        entries = self.entries()
        if codes is None:
            assert z is not None
            codes = self.search(z.detach(), entries.detach())
        return codes, F.embedding(codes, entries)

    def search(
        self, z: Float32[Tensor, "N d"], entries: Float32[Tensor, "K d"]
    ) -> Int64[Tensor, "N"]:
        """The code of each vector."""
        return nearest(z, entries, self.lean)


class Codebook(Entries):
    """A table of entries, each learned by itself; or several `tables` of as many codes each."""

    def __init__(self, codes: int, dim: int, normalized: bool, tables: int = 1) -> None:
        super().__init__()
        self.normalized = normalized
        weight = torch.empty(codes, dim).uniform_(-tables / codes, tables / codes)
        # of unit length from the start: a gradient step turns a tiny vector by any angle
        self.weight = nn.Parameter(F.normalize(weight, dim=-1) if normalized else weight)

    def entries(self) -> Float32[Tensor, "K d"]:
        weight = self.weight.float()
        return F.normalize(weight, dim=-1) if self.normalized else weight


@dataclasses.dataclass
class VectorQuantizerConfig(QuantizerConfig):
    """Codebook learned by gradient. `legacy` puts beta on the codebook term, as the original does
    by default; the published models were trained so (same loss value, other gradients).

    `normalized`: codes on the unit sphere. `initial`: random, or data or kmeans from the first
    global batch. A code that is chosen less than `revive_below` times as often as it would be if
    all codes were chosen alike takes the place of a latent of the present batch; 0: never.

    `gradient` that a latent gets of its entry: straight_through, as it is; rotation, turned and
    scaled as the entry is from the latent.
    """

    name: str = "vector"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    beta: float = ranged(0.25, at_least=0, compared=False)
    normalized: bool = False
    legacy: bool = marked(False, compared=False)
    initial: str = marked("random", compared=False)
    revive_below: float = ranged(0.0, at_least=0, below=1, compared=False)
    gradient: str = marked(STRAIGHT_THROUGH, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        check_start(self.initial)
        check_choice("model.quantizer.gradient", self.gradient, GRADIENTS)


class VectorQuantizer(Quantizer):
    """Equation 4: ||sg[E(x)] - z_q||^2 + beta ||sg[z_q] - E(x)||^2, means over all elements.

    `normalized` puts latents and entries on the unit sphere before they are compared (cosine
    similarity, low-dimensional codes).
    """

    def __init__(self, config: VectorQuantizerConfig, embedding: Entries | None = None) -> None:
        """`embedding`: the entries, where they are not a table of their own."""
        super().__init__()
        self.vocabulary, self.dim = config.codes, config.dim
        self.passed = GRADIENTS[config.gradient]
        self.normalized, self.beta, self.legacy = config.normalized, config.beta, config.legacy
        self.revive_below = config.revive_below
        self.embedding = embedding or Codebook(config.codes, config.dim, config.normalized)
        self.start = Start(config.initial)
        self.usage = Usage(config.codes) if config.revive_below else None

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            flat = self._vectors(z32)
            codes, entries = self.embedding(flat)
            codebook_term = F.mse_loss(entries, flat.detach())
            commitment = F.mse_loss(flat, entries.detach())
            on_codebook, on_encoder = (self.beta, 1.0) if self.legacy else (1.0, self.beta)
            return Quantized(
                z_q=as_grid(self.passed(flat, entries), z),
                codes=self._shaped(codes, z),
                loss=on_codebook * codebook_term + on_encoder * commitment,
                statistics=self._statistics(flat.detach().view(len(z), -1, self.dim), codes),
            )

    def _vectors(self, z: Float32[Tensor, "b d i j"]) -> Float32[Tensor, "N c"]:
        """What is compared with the entries."""
        return as_vectors(z, self.normalized)

    def _shaped(
        self, codes: Int64[Tensor, "N"], z: Float[Tensor, "b d i j"]
    ) -> Int64[Tensor, "b *shape"]:
        """The codes of the vectors in their shape."""
        return as_code_grid(codes, z)

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b *shape"]:
        codes, _ = self.embedding(self._vectors(z))
        return self._shaped(codes, z)

    def _statistics(
        self, latents: Float32[Tensor, "b n d"], codes: Int64[Tensor, "N"]
    ) -> Statistics:
        counts, at_start = count(codes, self.vocabulary), self.start.pending()
        if not self.training or (self.usage is None and not at_start):
            return Statistics(counts)
        return Statistics(counts, candidates=candidates(latents, at_start))

    def _pools(self, candidates: Float32[Tensor, "b k d"]) -> Sequence[Float32[Tensor, "P c"]]:
        """The vectors that may become entries; those of each table, where there are several."""
        return [candidates.flatten(0, 1)]

    def lookup(self, codes: Int64[Tensor, "b *shape"]) -> Float32[Tensor, "b d i j"]:
        _, entries = self.embedding(None, codes.flatten())
        return rearrange(entries, "(b i j) d -> b d i j", i=codes.shape[1], j=codes.shape[2])

    @torch.no_grad()
    def update(
        self, statistics: Statistics, generator: torch.Generator, replace_rows: ReplaceRows
    ) -> int | Int64[Tensor, ""]:
        """Dead codes take the place of latents; all else is the optimizer's."""
        if statistics.candidates is None:
            return 0
        pools = self._pools(statistics.candidates)
        if self.start.pending():
            own = self.vocabulary // len(pools)
            first = [self.start.entries(pool, own, self.normalized, generator) for pool in pools]
            everyone = torch.ones_like(statistics.counts).bool()
            replace_rows(self.embedding.weight, everyone, torch.cat(first))
            return 0
        assert self.usage is not None
        dead = self.usage.dead(statistics.counts, self.revive_below, len(pools[0]))
        of_tables = zip(pools, dead.chunk(len(pools)), strict=True)
        entries = [replacements(pool, part, generator) for pool, part in of_tables]
        replace_rows(self.embedding.weight, dead, torch.cat(entries))
        return dead.sum()
