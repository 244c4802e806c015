"""Finite scalar quantisation: every channel is rounded to one of a few levels. Nothing to learn.

Source: arXiv 2309.15505, sections 3.1 and A.1.
Legend: b batch, d latent channels (= number of levels), i j latent grid.
"""

import dataclasses
import math

import torch
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.constants import constant
from taming_dist.models.quantizers.interface import (
    MOST_CODES,
    Quantized,
    Quantizer,
    QuantizerConfig,
    Statistics,
    count,
    full_precision,
    straight_through,
)
from taming_dist.ranges import check_ranges, ranged


@dataclasses.dataclass
class FSQuantizerConfig(QuantizerConfig):
    """`levels` of each channel; the codes are all their combinations. The paper's: [8,5,5,5] for
    about 2^10 codes, [7,5,5,5,5] for 2^12, [8,8,8,6,5] for 2^14, [8,8,8,5,5,5] for 2^16."""

    whole = "its codes are combinations of levels"

    name: str = "fsq"
    levels: list[int] = ranged(MISSING, at_least=2)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        if self.codes > MOST_CODES:
            raise UserError(
                f"model.quantizer.levels={list(self.levels)}: they make {self.codes} codes, use "
                f"fewer, for at most {MOST_CODES}"
            )

    @property
    def codes(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return len(self.levels)


class FSQuantizer(Quantizer):
    """Each channel is bounded by a tanh to its number of levels and rounded; entries lie in [-1,1].
    There is no codebook and no loss of its own."""

    MARGIN = 1e-3  # beyond the outermost levels, so that finite latents reach them

    def __init__(self, config: FSQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim = config.codes, config.dim
        self.levels = list(config.levels)

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            bounded = self._bounded(z32.movedim(1, -1))
            rounded = bounded.round()
            codes = self._joined(rounded.detach())
            return Quantized(
                z_q=(straight_through(bounded, rounded) / self._half(z.device)).movedim(-1, 1),
                codes=codes,
                loss=z32.new_zeros(()),
                statistics=Statistics(count(codes, self.vocabulary)),
            )

    def _bounded(self, z: Float32[Tensor, "*size d"]) -> Float32[Tensor, "*size d"]:
        """Into (-L/2, L/2), so that rounding gives L integers: -L//2 ... (L-1)//2."""
        levels = constant(tuple(self.levels), torch.float32, z.device)
        half = (levels - 1) * (1 + self.MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)  # an even number of levels is not centred
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
        return self._joined(self._bounded(z.movedim(1, -1)).round())

    def _joined(self, rounded: Float32[Tensor, "*size d"]) -> Int64[Tensor, "*size"]:
        """Integers from -L//2 on -> codes, the first channel's digit the lowest, and that of a NaN
        0."""
        digits = (rounded + self._half(rounded.device)).nan_to_num(0)
        return (digits.long() * self._places(digits.device)).sum(-1)

    def lookup(self, codes: Int64[Tensor, "b i j"]) -> Float32[Tensor, "b d i j"]:
        levels = constant(tuple(self.levels), torch.int64, codes.device)
        digits = codes[..., None] // self._places(codes.device) % levels
        half = levels // 2
        return ((digits - half) / half).movedim(-1, 1)

    def _half(self, device: torch.device) -> Float32[Tensor, "d"]:
        """L//2 of each channel: its largest integer, or one more."""
        return constant(tuple(level // 2 for level in self.levels), torch.float32, device)

    def _places(self, device: torch.device) -> Int64[Tensor, "d"]:
        """What a digit counts: 1, L1, L1*L2, ..."""
        places = (math.prod(self.levels[:index]) for index in range(self.dim))
        return constant(tuple(places), torch.int64, device)
