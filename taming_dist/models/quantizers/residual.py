"""Residual quantisation: each level quantizes what the levels before it have left.

Source: RQ-VAE, arXiv 2203.01941, section 3.1, equations 2 to 8; the codebook, which all levels
share, is a moving average. Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j
vectors.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor

from taming_dist.models.quantizers.ema import EMAQuantizer, EMAQuantizerConfig
from taming_dist.models.quantizers.interface import (
    GRADIENTS,
    MOST_CHANNELS,
    MOST_CODES,
    STRAIGHT_THROUGH,
    Quantized,
    QuantizerConfig,
    Statistics,
    as_grid,
    as_vectors,
    count,
    full_precision,
    nearest,
)
from taming_dist.models.quantizers.restarts import candidates, check_start
from taming_dist.ranges import check_choice, check_ranges, marked, ranged

MOST_LEVELS = 64  # all of them are gone through at every step


@dataclasses.dataclass
class ResidualQuantizerConfig(QuantizerConfig):
    """`depth`: how many levels. The rest as in `EMAQuantizerConfig`, never normalized: the length
    of a vector says how much is left."""

    name: str = "residual"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    depth: int = ranged(MISSING, at_least=2, at_most=MOST_LEVELS)
    beta: float = ranged(0.25, at_least=0, compared=False)
    decay: float = ranged(0.99, at_least=0, below=1, compared=False)
    initial: str = marked("data", compared=False)
    revive_below: float = ranged(0.05, at_least=0, below=1, compared=False)
    gradient: str = marked(STRAIGHT_THROUGH, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        check_start(self.initial)
        check_choice("model.quantizer.gradient", self.gradient, GRADIENTS)

    def code_shape(self, i: int, j: int) -> tuple[int, ...]:
        return self.depth, i, j


class Levels(NamedTuple):
    """Of N vectors the codes of each level, and the sums of the entries up to each level."""

    codes: Int64[Tensor, "levels N"]
    sums: Float32[Tensor, "levels N d"]


class ResidualQuantizer(EMAQuantizer):
    """The codebook follows the mean of what its codes were chosen for, at whatever level; the loss
    is beta * sum over levels of ||z - sg[sum of the entries up to the level]||^2 (equation 8)."""

    def __init__(self, config: ResidualQuantizerConfig) -> None:
        plain = EMAQuantizerConfig(
            codes=config.codes,
            dim=config.dim,
            beta=config.beta,
            decay=config.decay,
            normalized=False,
            initial=config.initial,
            revive_below=config.revive_below,
            gradient=config.gradient,
        )
        super().__init__(plain)
        self.depth = config.depth

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            flat = as_vectors(z32)
            levels = self._quantized(flat.detach())
            return Quantized(
                z_q=as_grid(self.passed(flat, levels.sums[-1]), z),
                codes=self._shaped(levels.codes, z),
                loss=self.beta
                * torch.stack([F.mse_loss(flat, each) for each in levels.sums]).sum(),
                statistics=self._of_levels(flat.detach(), levels, len(z)),
            )

    def _quantized(self, flat: Float32[Tensor, "N d"]) -> Levels:
        total, codes, sums = torch.zeros_like(flat), [], []
        for _ in range(self.depth):
            codes.append(nearest(flat - total, self.entries, self.lean))
            total = total + F.embedding(codes[-1], self.entries)
            sums.append(total)
        return Levels(torch.stack(codes), torch.stack(sums))

    def _shaped(
        self, codes: Int64[Tensor, "levels N"], z: Float[Tensor, "b d i j"]
    ) -> Int64[Tensor, "b levels i j"]:
        return rearrange(codes, "l (b i j) -> b l i j", i=z.shape[2], j=z.shape[3]).contiguous()

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b levels i j"]:
        return self._shaped(self._quantized(as_vectors(z)).codes, z)

    def _of_levels(self, flat: Float32[Tensor, "N d"], levels: Levels, images: int) -> Statistics:
        """Those of all levels together: of each code, and of what it was chosen for."""
        counts = count(levels.codes, self.vocabulary)
        if not self.training:
            return Statistics(counts)
        left = [flat, *(flat - total for total in levels.sums[:-1])]
        sums = torch.zeros_like(self.entries)
        sums.index_add_(0, levels.codes.flatten(), torch.cat(left))
        at_start = self.start.pending()
        if at_start:
            left = [flat]  # what is left of it, `first_entries` finds
        offered = [candidates(each.view(images, -1, self.dim), at_start) for each in left]
        return Statistics(counts, sums, torch.cat(offered, 1))

    def lookup(self, codes: Int64[Tensor, "b levels i j"]) -> Float32[Tensor, "b d i j"]:
        levels = F.embedding(codes, self.entries).unbind(1)
        total = torch.zeros_like(levels[0])
        for entries in levels:  # one after the other, as they were added up
            total = total + entries
        return rearrange(total, "b i j d -> b d i j")

    def first_entries(
        self, pool: Float32[Tensor, "P d"], generator: torch.Generator
    ) -> Float32[Tensor, "K d"]:
        """A share of the codebook for each level, of what the shares before it leave."""
        shares = [len(each) for each in torch.arange(self.vocabulary).tensor_split(self.depth)]
        found, left = [], pool
        for share in filter(None, shares):
            found.append(self.start.entries(left, share, False, generator))
            left = left - F.embedding(nearest(left, found[-1]), found[-1])
        return torch.cat(found)
