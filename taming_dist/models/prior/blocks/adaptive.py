"""Norms that the condition moves.

Source: arXiv 2212.09748, section 3.2 ("adaLN-Zero"). Legend: b batch, t positions, c width.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.models.initial import ZeroLinear


class Modulation(nn.Module):
    """From the signal to `count` factors and offsets; all are zero at first."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = ZeroLinear(width, count * width)

    def forward(self, signal: Float[Tensor, "b c"]) -> tuple[Float[Tensor, "b 1 c"], ...]:
        """Return them, the same for all positions."""
        return self.linear(F.silu(signal)).unsqueeze(1).chunk(self.count, dim=-1)


def moved(
    x: Float[Tensor, "b t c"], shift: Float[Tensor, "b 1 c"], scale: Float[Tensor, "b 1 c"]
) -> Float[Tensor, "b t c"]:
    """Return a norm's answer, moved."""
    return x * (1 + scale) + shift


class AdaptiveNorm(nn.Module):
    """A norm, moved by the signal."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = Modulation(width, 2)

    def forward(
        self, x: Float[Tensor, "b t c"], signal: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b t c"]:
        shift, scale = self.modulation(signal)
        return moved(self.norm(x), shift, scale)
