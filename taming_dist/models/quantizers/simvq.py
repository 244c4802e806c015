"""Vector quantisation whose codes are frozen and moved together by one linear layer (SimVQ).

A code that is not chosen gets no gradient of its own, and is left behind where the latents were;
here the layer moves all of them, so that none dies. Source: arXiv 2411.02038, equation 8.
Legend: d latent channels, K codes.
"""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float32
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.models.quantizers.interface import (
    GRADIENTS,
    MOST_CHANNELS,
    MOST_CODES,
    STRAIGHT_THROUGH,
    QuantizerConfig,
)
from taming_dist.models.quantizers.vector import Entries, VectorQuantizer, VectorQuantizerConfig
from taming_dist.ranges import check_choice, check_ranges, marked, ranged


class MovedCodebook(Entries):
    """Rows that never change, times a weight [d,d] that is learned: the entries."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randn(codes, dim) * dim**-0.5)
        self.rows: Tensor
        self.weight = nn.Parameter(torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def entries(self) -> Float32[Tensor, "K d"]:
        return F.linear(self.rows, self.weight.float())


@dataclasses.dataclass
class SimVQConfig(QuantizerConfig):
    """`beta`: the weight of the commitment term; `gradient`: as in `VectorQuantizerConfig`."""

    without_rows = ("embedding.weight",)

    name: str = "simvq"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    beta: float = ranged(0.25, at_least=0, compared=False)
    gradient: str = marked(STRAIGHT_THROUGH, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")
        check_choice("model.quantizer.gradient", self.gradient, GRADIENTS)


class SimVQuantizer(VectorQuantizer):
    """The loss and the search of `VectorQuantizer`; codes are not restarted, for none is dead."""

    def __init__(self, config: SimVQConfig) -> None:
        plain = VectorQuantizerConfig(
            codes=config.codes, dim=config.dim, beta=config.beta, gradient=config.gradient
        )
        super().__init__(plain, MovedCodebook(config.codes, config.dim))
