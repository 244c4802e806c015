"""Vector quantisation: every latent vector becomes one of K codebook entries.

Source: arXiv 2012.09841, section 3.1, equations 2 to 4; l2-normalised codes: arXiv 2110.04627;
moving-average codebooks: arXiv 1711.00937, appendix A.
Everything here computes in fp32, whatever the precision of the networks around it.
Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j vectors.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.errors import UserError

SEARCH_BYTES = 64 << 20  # the largest block of the distance matrix that is ever held


class Statistics(NamedTuple):
    """What `update` and the usage metrics need of one call, to be brought together over all calls.

    counts [K]: how often each code was chosen; sums [K,d]: sums of the vectors assigned to each
    code (both are added up); candidates [b,k,d]: a few latents of each image for dead codes
    (joined in the order of the global batch). The last two are None where nobody needs them.
    """

    counts: Tensor
    sums: Tensor | None = None
    candidates: Tensor | None = None


class Quantized(NamedTuple):
    """What a quantizer gives. (A tuple, because ZeRO-3 looks for tensors in tuples only.)

    z_q [b,d,i,j]: the chosen entries, with the straight-through gradient to z (fp32);
    codes [b,i,j]: their indices, int64; loss: the codebook loss, a scalar; statistics: see there.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    statistics: Statistics


class Quantizer(Protocol):
    """What the VQGAN and the recipe know of a quantizer."""

    vocabulary: int
    dim: int

    def __call__(self, z: Tensor) -> Quantized: ...

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [b,i,j] -> entries [b,d,i,j]."""
        ...

    def update(self, statistics: Statistics, generator: torch.Generator) -> int:
        """Take in the statistics of a whole optimizer step over all ranks; gives revived codes."""
        ...


@contextmanager
def full_precision(z: Tensor) -> Iterator[Tensor]:
    """The latents in fp32, with autocast off."""
    with torch.autocast(z.device.type, enabled=False):
        yield z.float()


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Index of the nearest entry for every vector: z [N,d], entries [K,d] -> [N] int64.

    The distances are taken in blocks of rows, so that N*K numbers are never held at once. Ties go
    to the lowest index. A vector that is not finite is an error, not code 0.
    """
    if not torch.isfinite(z).all():
        raise FloatingPointError("the encoder gave latents that are not finite")
    rows = max(1, SEARCH_BYTES // (4 * len(entries)))
    squared = entries.square().sum(1)
    # |z|^2 is the same for every entry and is left out
    return torch.cat(
        [torch.argmin(torch.addmm(squared, part, entries.T, alpha=-2), 1) for part in z.split(rows)]
    )


class StaysFloat32(nn.Module):
    """A module whose numbers stay fp32 when the model around it is cast to bf16 or fp16.

    Rounded entries would give other codes than those that stage 2 was trained on.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysFloat32":
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        return self


class Codebook(StaysFloat32):
    """The entries [K,d]; the weight is used in this module's own forward, where ZeRO-3 has it."""

    def __init__(self, codes: int, dim: int, normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized
        self.weight = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))

    def entries(self) -> Tensor:
        weight = self.weight.float()
        return F.normalize(weight, dim=-1) if self.normalized else weight

    def forward(self, z: Tensor | None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors [N,d] (or codes [N]) -> codes [N], their entries [N,d]."""
        entries = self.entries()
        if codes is None:
            assert z is not None
            codes = nearest(z.detach(), entries.detach())
        return codes, F.embedding(codes, entries)


def count(codes: Tensor, vocabulary: int) -> Tensor:
    """How often each code occurs: [K] float32 (exact up to 2^24 per call)."""
    return torch.bincount(codes.flatten(), minlength=vocabulary).float()


@dataclasses.dataclass
class VectorQuantizerConfig:
    """Codebook learned by gradient. `legacy` puts beta on the codebook term, as the original does
    by default; the published models were trained so (same loss value, other gradients)."""

    name: str = "vector"
    codes: int = MISSING
    dim: int = MISSING
    beta: float = 0.25
    normalized: bool = False
    legacy: bool = False


class VectorQuantizer(nn.Module):
    """Equation 4: ||sg[E(x)] - z_q||^2 + beta ||sg[z_q] - E(x)||^2, means over all elements.

    `normalized` puts latents and entries on the unit sphere before they are compared (cosine
    similarity, low-dimensional codes).
    """

    def __init__(self, config: VectorQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim = config.codes, config.dim
        self.normalized, self.beta, self.legacy = config.normalized, config.beta, config.legacy
        self.embedding = Codebook(config.codes, config.dim, config.normalized)

    def forward(self, z: Tensor) -> Quantized:
        with full_precision(z) as z32:
            flat = rearrange(z32, "b d i j -> (b i j) d")
            if self.normalized:
                flat = F.normalize(flat, dim=-1)
            codes, entries = self.embedding(flat)
            codebook_term = F.mse_loss(entries, flat.detach())
            commitment = F.mse_loss(flat, entries.detach())
            on_codebook, on_encoder = (self.beta, 1.0) if self.legacy else (1.0, self.beta)
            loss = on_codebook * codebook_term + on_encoder * commitment
            statistics = Statistics(count(codes, self.vocabulary))
            return _quantized(z, flat, entries, codes, loss, statistics)

    def lookup(self, codes: Tensor) -> Tensor:
        _, entries = self.embedding(None, codes.flatten())
        return rearrange(entries, "(b i j) d -> b d i j", i=codes.shape[1], j=codes.shape[2])

    def update(self, statistics: Statistics, generator: torch.Generator) -> int:
        return 0  # the optimizer moves the entries


def _quantized(
    z: Tensor, flat: Tensor, entries: Tensor, codes: Tensor, loss: Tensor, statistics: Statistics
) -> Quantized:
    b, _, i, j = z.shape
    through = flat + (entries - flat).detach()  # straight-through: d z_q / d z = 1
    return Quantized(
        z_q=rearrange(through, "(b i j) d -> b d i j", b=b, i=i, j=j),
        codes=codes.view(b, i, j),
        loss=loss,
        statistics=statistics,
    )


@dataclasses.dataclass
class EMAQuantizerConfig:
    """Codebook as a moving average of the latents assigned to each code, with dead codes revived.

    `decay` is per optimizer step. A code that is chosen less than `revive_below` times as often as
    it would be if all codes were chosen alike takes the place of a latent of the present batch.
    """

    name: str = "ema"
    codes: int = MISSING
    dim: int = MISSING
    beta: float = 0.25
    decay: float = 0.99
    normalized: bool = True
    revive_below: float = 0.05


class EMAQuantizer(StaysFloat32):
    """Entries follow the mean of their latents (1711.00937, equations 6 to 8); only the commitment
    term is learned by gradient. The entries are buffers, changed by `update` alone, from statistics
    that the caller has added up over ranks: so they are the same everywhere.
    """

    CANDIDATES = 4  # latents of each image that are offered to dead codes

    def __init__(self, config: EMAQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim, self.beta = config.codes, config.dim, config.beta
        self.normalized, self.decay = config.normalized, config.decay
        self.revive_below = config.revive_below
        entries = torch.randn(config.codes, config.dim)
        self.register_buffer(
            "entries", F.normalize(entries, dim=-1) if self.normalized else entries
        )
        self.register_buffer("cluster_size", torch.ones(config.codes))
        self.register_buffer("cluster_sum", self.entries.clone())
        self.entries: Tensor
        self.cluster_size: Tensor
        self.cluster_sum: Tensor

    def forward(self, z: Tensor) -> Quantized:
        with full_precision(z) as z32:
            flat = rearrange(z32, "b d i j -> (b i j) d")
            if self.normalized:
                flat = F.normalize(flat, dim=-1)
            codes = nearest(flat.detach(), self.entries)
            entries = F.embedding(codes, self.entries)
            loss = self.beta * F.mse_loss(flat, entries)
            statistics = self._statistics(flat.detach().view(len(z), -1, self.dim), codes)
            return _quantized(z, flat, entries, codes, loss, statistics)

    def _statistics(self, latents: Tensor, codes: Tensor) -> Statistics:
        """From latents [b,n,d] and codes [b*n]."""
        counts = count(codes, self.vocabulary)
        if not self.training:
            return Statistics(counts)
        sums = torch.zeros_like(self.entries).index_add_(0, codes, latents.flatten(0, 1))
        stride = -(-latents.shape[1] // self.CANDIDATES)
        return Statistics(counts, sums, latents[:, ::stride])

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(F.embedding(codes, self.entries), "b i j d -> b d i j")

    @torch.no_grad()
    def update(self, statistics: Statistics, generator: torch.Generator) -> int:
        assert statistics.sums is not None
        assert statistics.candidates is not None
        self.cluster_size.lerp_(statistics.counts, 1 - self.decay)
        self.cluster_sum.lerp_(statistics.sums, 1 - self.decay)
        means = self.cluster_sum / self.cluster_size.clamp(min=1e-5)[:, None]
        self.entries.copy_(F.normalize(means, dim=-1) if self.normalized else means)
        return self._revive(statistics.candidates.flatten(0, 1), generator)

    def _revive(self, pool: Tensor, generator: torch.Generator) -> int:
        alike = self.cluster_size.mean()
        dead = (self.cluster_size < self.revive_below * alike).nonzero().flatten()
        dead = dead[: len(pool)]  # each latent revives one code at most; the others wait
        chosen = torch.randperm(len(pool), generator=generator)[: len(dead)].to(pool.device)
        self.entries[dead] = pool[chosen]
        # the averages start again with the revived entry, or the next update would undo it
        self.cluster_size[dead] = alike
        self.cluster_sum[dead] = alike * pool[chosen]
        return len(dead)


VARIANTS: dict[str, tuple[Any, Any]] = {
    "vector": (VectorQuantizerConfig, VectorQuantizer),
    "ema": (EMAQuantizerConfig, EMAQuantizer),
}


def quantizer_config(values: Any) -> Any:
    """The config dataclass of a quantizer from plain values with its `name` (config.json)."""
    if not isinstance(values, dict):
        return values
    if values.get("name") not in VARIANTS:
        raise UserError(f"model.quantizer.name={values.get('name')}: use one of {sorted(VARIANTS)}")
    return VARIANTS[values["name"]][0](**values)


def build_quantizer(config: Any) -> Any:
    """The quantizer of its config."""
    return VARIANTS[config.name][1](config)
