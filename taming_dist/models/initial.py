"""First values of weights that do not depend on where the weights are."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def draw_normal(weight: Float[Tensor, "..."], mean: float, std: float) -> None:
    """`nn.init.normal_` with numbers of the CPU's generator: under ZeRO 3 a weight is on its GPU
    when its network draws it, whose generator gives others."""
    weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).normal_(mean, std))
