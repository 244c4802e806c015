"""Entries taken from the data: at the start of a run, and for codes that nothing chooses any more.

Every rank calls these with the same pool (the latents of the global batch) and a generator of the
same seed, so that all codebooks stay the same.
Legend: d latent channels, K codes, P latents in the pool.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32
from torch import Tensor, nn

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.models.quantizers.interface import StaysFloat32, nearest

CANDIDATES = 4  # latents of each image that are offered to dead codes ...
CANDIDATES_AT_START = 256  # ... and to a codebook that is set from its first batch
KMEANS_ROUNDS = 10
JITTER = 0.01  # of the pool's standard deviation, where one latent has to start several codes

STARTS = ("random", "data", "kmeans")


def check_start(initial: str) -> None:
    """UserError unless a codebook can start like this."""
    if initial not in STARTS:
        raise UserError(f"model.quantizer.initial={initial}: use one of {', '.join(STARTS)}")


class Start(StaysFloat32):
    """Whether the codebook has been set from the first global batch; remembered in checkpoints.

    `kind`: random (nothing to do), data (latents drawn from the batch), kmeans (their clusters).
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._done = kind == "random"
        if not self._done:
            self.register_buffer("done", torch.zeros((), dtype=torch.uint8))
        self.done: Tensor

    def pending(self) -> bool:
        """Whether the codebook still waits for its first batch."""
        if not self._done:
            self._done = bool(self.done)  # asked of the device only until it is true
        return not self._done

    def entries(
        self,
        pool: Float32[Tensor, "P d"],
        codes: int,
        normalized: bool,
        generator: torch.Generator,
    ) -> Float32[Tensor, "{codes} d"]:
        """The first entries from the pool; from now on nothing is pending."""
        self.done.fill_(1)
        entries = draw(pool, codes, generator)
        if normalized:
            entries = F.normalize(entries, dim=-1)
        return kmeans(pool, entries, normalized) if self.kind == "kmeans" else entries


def candidates(latents: Float32[Tensor, "b n d"], at_start: bool) -> Float32[Tensor, "b k d"]:
    """A few evenly spaced latents of each image."""
    wanted = CANDIDATES_AT_START if at_start else CANDIDATES
    return latents[:, :: -(-latents.shape[1] // wanted)]


def draw(
    pool: Float32[Tensor, "P d"], wanted: int, generator: torch.Generator
) -> Float32[Tensor, "{wanted} d"]:
    """Rows of the pool at random, each once; a smaller pool is gone through again, with noise."""
    rounds = -(-wanted // len(pool))
    order = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(rounds)])
    drawn = pool[to_device(order[:wanted], pool.device)]
    noise = to_device(torch.randn(drawn.shape, generator=generator), pool.device) * JITTER
    noise[: len(pool)] = 0
    return drawn + noise * pool.std(0, correction=0)


def replacements(
    pool: Float32[Tensor, "P d"], dead: Bool[Tensor, "K"], generator: torch.Generator
) -> Float32[Tensor, "K d"]:
    """Latents for the codes whose flag is set in `dead`, drawn from the pool, each once: the n-th
    dead code gets the n-th of a random order. The rows of the others mean nothing.
    """
    order = to_device(torch.randperm(len(pool), generator=generator), pool.device)
    return pool[order[(dead.cumsum(0) - 1).clamp(0, len(pool) - 1)]]


def kmeans(
    pool: Float32[Tensor, "P d"], entries: Float32[Tensor, "K d"], normalized: bool
) -> Float32[Tensor, "K d"]:
    """Lloyd's algorithm from the entries; a cluster without members keeps its place."""
    for _ in range(KMEANS_ROUNDS):
        # on the CPU, where sums come out the same to the bit on every rank
        codes = nearest(pool, entries).cpu()
        sums = torch.zeros(entries.shape).index_add_(0, codes, pool.cpu())
        sizes = torch.bincount(codes, minlength=len(entries))[:, None]
        means = to_device(sums / sizes.clamp(min=1), pool.device)
        if normalized:
            means = F.normalize(means, dim=-1)
        entries = torch.where(to_device(sizes, pool.device) > 0, means, entries)
    return entries


def dead_codes(usage: Float32[Tensor, "K"], revive_below: float, limit: int) -> Bool[Tensor, "K"]:
    """Flags of the codes used less than `revive_below` times the average; of the first `limit` of
    them (the others wait)."""
    dead = usage < revive_below * usage.mean()
    return dead & (dead.cumsum(0) <= limit)


class Usage(nn.Module):
    """A running mean of how often each code is chosen per optimizer step; finds the dead."""

    DECAY = 0.99

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(codes))
        self.mean: Tensor

    def dead(
        self, counts: Float32[Tensor, "K"], revive_below: float, limit: int
    ) -> Bool[Tensor, "K"]:
        """Take in counts; flags of the codes to restart, which count as of average use from now."""
        self.mean.lerp_(counts, 1 - self.DECAY)
        dead = dead_codes(self.mean, revive_below, limit)
        self.mean.copy_(torch.where(dead, self.mean.mean(), self.mean))
        return dead
