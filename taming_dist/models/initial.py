"""First values of weights that do not depend on where the weights are."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StartsAtZero:
    """Base of layers whose `weight` is zero at first, instead of drawn."""

    weight: Tensor


class ZeroLinear(StartsAtZero, nn.Linear):
    """A linear layer that answers zero at first."""


@torch.no_grad()
def draw_normal(weight: Float[Tensor, "..."], mean: float, std: float) -> None:
    """`nn.init.normal_` with numbers of the CPU's generator: under ZeRO 3 a weight is on its GPU
    when its network draws it, whose generator gives others."""
    weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).normal_(mean, std))
