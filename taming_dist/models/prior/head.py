"""The last layer of the transformer: logits of the next code, or the loss of what it was.

Legend: b batch dimensions, t rows, c width, v vocabulary.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taming_dist.losses.tokens import nll_of
from taming_dist.models.initial import StartsAtZero

# From this vocabulary on the loss keeps no logits: all of a batch would be more memory than the
# blocks take. They are computed again in the backward pass, LOGITS at once (256 MiB in fp32).
LARGE_VOCABULARY = 16_384
LOGITS = 2**26


class Head(nn.Linear):
    """From the last norm's answer to logits, or straight to the loss."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(
        self, x: Float[Tensor, "*b c"], targets: Int64[Tensor, "*b"] | None = None
    ) -> Float[Tensor, "*b v"] | Float32[Tensor, "*b"]:
        """Return logits, or the negative log-likelihood of targets."""
        if targets is None:
            return super().forward(x)
        rows, flat = x.flatten(0, -2), targets.flatten()
        if self.out_features < LARGE_VOCABULARY:
            return self._nll(rows, flat).view(targets.shape)
        size = LOGITS // self.out_features
        parts = zip(rows.split(size), flat.split(size), strict=True)
        # there is no randomness in it to be repeated, whose state the host would wait for
        nll = [
            checkpoint(self._nll, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.cat(nll).view(targets.shape)

    def _nll(self, x: Float[Tensor, "t c"], targets: Int64[Tensor, "t"]) -> Float32[Tensor, "t"]:
        return nll_of(super().forward(x), targets)


class ZeroHead(StartsAtZero, Head):
    """A head whose first logits are all zero: each code is as likely as any other."""
