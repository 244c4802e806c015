"""Multi-scale residual quantisation (VAR): an image is a few codes of its whole, then of what they
leave at finer and finer scales, all from one codebook.

Source: arXiv 2404.02905, section 3.2, algorithms 1 and 2; the loss, the shared convolutions and the
search by direction are those of its authors' code.
Legend: b batch, d latent channels, i latent grid (square), n codes of all scales, K codes of the
codebook, N vectors.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.quantizers.interface import (
    GRADIENTS,
    MOST_CHANNELS,
    MOST_CODES,
    STRAIGHT_THROUGH,
    Quantized,
    QuantizerConfig,
    as_grid,
    as_vectors,
    full_precision,
    nearest,
)
from taming_dist.models.quantizers.restarts import check_start
from taming_dist.models.quantizers.vector import Codebook, VectorQuantizer, VectorQuantizerConfig
from taming_dist.models.scales import check_scales, counts, larger, smaller, starts
from taming_dist.ranges import check_choice, check_ranges, marked, ranged

PHIS = 4  # convolutions that the scales share
SHARE = 0.5  # of the convolution in what phi gives


@dataclasses.dataclass
class MultiScaleConfig(QuantizerConfig):
    """`scales`: the sides of the square grids that an image has codes of, from 1 to that of the
    latents. `normalized`: the entry of the nearest direction is chosen, whatever its length; the
    entry itself keeps it. The other keys are those of `VectorQuantizerConfig`.
    """

    without_rows = tuple(f"phis.{k}.{name}" for k in range(PHIS) for name in ("weight", "bias"))

    name: str = "multiscale"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    scales: list[int] = ranged([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], at_least=1)
    beta: float = ranged(0.25, at_least=0, compared=False)
    normalized: bool = False
    initial: str = marked("random", compared=False)
    revive_below: float = ranged(0.0, at_least=0, below=1, compared=False)
    gradient: str = marked(STRAIGHT_THROUGH, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        check_scales("model.quantizer.scales", self.scales)
        check_start(self.initial)
        check_choice("model.quantizer.gradient", self.gradient, GRADIENTS)

    def code_shape(self, i: int, j: int) -> tuple[int, ...]:
        side = self.scales[-1]
        if (i, j) != (side, side):
            raise UserError(
                f"model.quantizer.scales={list(self.scales)}: they end with {side}, but images of "
                f"that size have {i} x {j} latents: let the scales end with their side, or take "
                f"images of {side} x {side} latents"
            )
        return (sum(counts(self.scales)),)

    def latent_grid(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.scales[-1], self.scales[-1]


class SharedCodebook(Codebook):
    """A table of entries of any length, found by it or by their direction alone."""

    def __init__(self, codes: int, dim: int, by_direction: bool) -> None:
        super().__init__(codes, dim, normalized=False)
        self.by_direction = by_direction

    def search(
        self, z: Float32[Tensor, "N d"], entries: Float32[Tensor, "K d"]
    ) -> Int64[Tensor, "N"]:
        if self.by_direction:
            z, entries = F.normalize(z, dim=-1), F.normalize(entries, dim=-1)
        return nearest(z, entries, self.lean)


class Phi(nn.Conv2d):
    """Half of x, and half of a convolution of it: mends what interpolation has lost."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1)

    def forward(self, x: Float32[Tensor, "b d i i"]) -> Float32[Tensor, "b d i i"]:
        return torch.lerp(x, super().forward(x), SHARE)


class Stage(NamedTuple):
    """A scale of an image: what was left for it, its codes, and the sum of all up to it."""

    rest: Float32[Tensor, "N d"]
    codes: Int64[Tensor, "N"]
    total: Float32[Tensor, "b d i i"]


class MultiScaleQuantizer(VectorQuantizer):
    """Codes [b, n] of all scales, row by row, coarse to fine. A scale takes the remaining residual,
    brought down to its grid; its entries, brought up again and through phi, are subtracted.

    The loss is that of `VectorQuantizer` for the sum of the entries up to each scale, averaged over
    the scales.
    """

    def __init__(self, config: MultiScaleConfig) -> None:
        plain = VectorQuantizerConfig(
            codes=config.codes,
            dim=config.dim,
            beta=config.beta,
            initial=config.initial,
            revive_below=config.revive_below,
            gradient=config.gradient,
        )
        super().__init__(plain, SharedCodebook(config.codes, config.dim, config.normalized))
        self.config, self.scales = config, config.scales
        self.phis = nn.ModuleList(Phi(config.dim) for _ in range(min(PHIS, len(self.scales))))
        self._phi_of = shared(len(self.scales), len(self.phis))

    def forward(self, z: Float[Tensor, "b d i i"]) -> Quantized:
        with full_precision(z) as z32:
            stages = list(self._stages(z32))
            terms = [
                F.mse_loss(total, z32.detach()) + self.beta * F.mse_loss(z32, total.detach())
                for _, _, total in stages
            ]
            codes = self._joined(stages, len(z))
            latents = [stage.rest.view(len(z), -1, self.dim) for stage in stages]
            passed = self.passed(as_vectors(z32), as_vectors(stages[-1].total))
            return Quantized(
                z_q=as_grid(passed, z),
                codes=codes,
                loss=torch.stack(terms).mean(),
                statistics=self._statistics(torch.cat(latents, 1), codes.flatten()),
            )

    def _codes_of(self, z: Float32[Tensor, "b d i i"]) -> Int64[Tensor, "b n"]:
        return self._joined(list(self._stages(z)), len(z))

    def lookup(self, codes: Int64[Tensor, "b n"]) -> Float32[Tensor, "b d i i"]:
        """Codes of all scales, or of the first ones, from which a coarser picture comes -> the sum
        of what their entries make."""
        begun = sum(first < codes.shape[1] for first in starts(self.scales))
        total: Tensor | None = None
        for k, own in enumerate(codes.split(counts(self.scales)[:begun], 1)):
            _, entries = self.embedding(None, own.flatten())
            drawn = self._drawn(k, entries)
            total = drawn if total is None else total + drawn
        assert total is not None
        return total

    def _stages(self, z: Float32[Tensor, "b d i i"]) -> Iterator[Stage]:
        """Yield the scales of latents."""
        self.config.code_shape(*z.shape[2:])
        total = torch.zeros_like(z)
        for k, side in enumerate(self.scales):
            rest = as_vectors(smaller((z - total).detach(), side))
            codes, entries = self.embedding(rest)
            total = total + self._drawn(k, entries)
            yield Stage(rest, codes, total)

    def _drawn(self, k: int, entries: Float32[Tensor, "N d"]) -> Float32[Tensor, "b d i i"]:
        """What the entries of scale k add to the latents."""
        side = self.scales[k]
        grid = rearrange(entries, "(b i j) d -> b d i j", i=side, j=side)
        return self.phis[self._phi_of[k]](larger(grid, self.scales[-1]))

    def _joined(self, stages: list[Stage], images: int) -> Int64[Tensor, "b n"]:
        return torch.cat([stage.codes.view(images, -1) for stage in stages], 1)


def shared(scales: int, phis: int) -> list[int]:
    """Which phi each scale has: the one whose place is nearest to the scale's, between 0 and 1."""
    edge = 1 / ((3 if phis == PHIS else 2) * phis)
    places = np.linspace(edge, 1 - edge, phis)
    return [int(np.abs(places - k / max(1, scales - 1)).argmin()) for k in range(scales)]
