"""Product quantisation: the channels are cut into parts, and each part has a table of its own.

Source: UniTok, arXiv 2502.20321, section 3.2 (multi-codebook quantization). Legend: b batch, d
latent channels, i j latent grid, m tables, K codes of all tables, N = b*i*j*m vectors of d/m.
"""

import dataclasses
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.quantizers.interface import (
    GRADIENTS,
    MOST_CHANNELS,
    MOST_CODES,
    STRAIGHT_THROUGH,
    QuantizerConfig,
    as_vectors,
    nearest,
)
from taming_dist.models.quantizers.restarts import check_start
from taming_dist.models.quantizers.vector import Codebook, VectorQuantizer, VectorQuantizerConfig
from taming_dist.ranges import check_choice, check_ranges, marked, ranged


@dataclasses.dataclass
class ProductQuantizerConfig(QuantizerConfig):
    """`tables`, whose `codes` together are numbered one table after the other: each has
    codes/tables of them, with entries of dim/tables channels. The rest as in
    `VectorQuantizerConfig`."""

    whole = "its tables have equally many codes"

    name: str = "product"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    tables: int = ranged(MISSING, at_least=2)
    beta: float = ranged(0.25, at_least=0, compared=False)
    normalized: bool = True
    initial: str = marked("random", compared=False)
    revive_below: float = ranged(0.0, at_least=0, below=1, compared=False)
    gradient: str = marked(STRAIGHT_THROUGH, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        check_start(self.initial)
        check_choice("model.quantizer.gradient", self.gradient, GRADIENTS)
        for name, count in (("codes", self.codes), ("dim", self.dim)):
            if MISSING not in (count, self.tables) and count % self.tables:
                raise UserError(
                    f"model.quantizer.tables={self.tables}: {name}={count} does not divide by it, "
                    f"use {name}={-(-count // self.tables) * self.tables} or other tables"
                )

    def code_shape(self, i: int, j: int) -> tuple[int, ...]:
        return self.tables, i, j


class Tables(Codebook):
    """The entries of m tables, one table after the other; row r of the vectors is for table
    r % m."""

    def __init__(self, codes: int, dim: int, normalized: bool, tables: int) -> None:
        super().__init__(codes, dim, normalized, tables)
        self.tables = tables

    def search(
        self, z: Float32[Tensor, "N d"], entries: Float32[Tensor, "K d"]
    ) -> Int64[Tensor, "N"]:
        own, parts = entries.chunk(self.tables), z.unflatten(0, (-1, self.tables)).unbind(1)
        found = [
            nearest(part, table, self.lean) + number * len(table)
            for number, (part, table) in enumerate(zip(parts, own, strict=True))
        ]
        return torch.stack(found, 1).flatten()


class ProductQuantizer(VectorQuantizer):
    """The loss, gradients and restarts of `VectorQuantizer` for each part of a latent by itself."""

    def __init__(self, config: ProductQuantizerConfig) -> None:
        plain = VectorQuantizerConfig(
            codes=config.codes,
            dim=config.dim,
            beta=config.beta,
            normalized=config.normalized,
            initial=config.initial,
            revive_below=config.revive_below,
            gradient=config.gradient,
        )
        own = config.dim // config.tables
        super().__init__(plain, Tables(config.codes, own, config.normalized, config.tables))
        self.tables = config.tables

    def _vectors(self, z: Float32[Tensor, "b d i j"]) -> Float32[Tensor, "N c"]:
        return as_vectors(z, self.normalized, self.tables)

    def _shaped(
        self, codes: Int64[Tensor, "N"], z: Float[Tensor, "b d i j"]
    ) -> Int64[Tensor, "b m i j"]:
        b, _, i, j = z.shape
        return rearrange(codes, "(b i j m) -> b m i j", b=b, i=i, j=j)

    def lookup(self, codes: Int64[Tensor, "b m i j"]) -> Float32[Tensor, "b d i j"]:
        _, entries = self.embedding(None, codes.flatten())
        return rearrange(entries.view(*codes.shape, -1), "b m i j c -> b (m c) i j")

    def _pools(self, candidates: Float32[Tensor, "b k d"]) -> Sequence[Float32[Tensor, "P c"]]:
        return candidates.flatten(0, 1).unflatten(1, (self.tables, -1)).unbind(1)
