"""The last layer of the transformer: logits of the next code, or the loss of what it was.

Legend: b batch dimensions, c width, v vocabulary.
"""

import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn


class Head(nn.Linear):
    """From the last norm's answer to logits, or straight to the loss."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(
        self, x: Float[Tensor, "*b c"], targets: Int64[Tensor, "*b"] | None = None
    ) -> Float[Tensor, "*b v"] | Float32[Tensor, "*b"]:
        """Return logits, or the negative log-likelihood of targets."""
        logits = super().forward(x)
        if targets is None:
            return logits
        nll = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
        return nll.view(targets.shape)
