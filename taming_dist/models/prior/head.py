"""The last layer of the transformer: logits of the next code, or the loss of what it was.

Legend: b batch dimensions, t rows, c width, v vocabulary.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taming_dist.losses.tokens import nll_of
from taming_dist.models.initial import StartsAtZero

# From this vocabulary on the loss keeps no logits: all of a batch would be more memory than the
# blocks take. They are computed again in the backward pass, LOGITS at once (256 MiB in fp32).
LARGE_VOCABULARY = 16_384
LOGITS = 2**26


class Judged(NamedTuple):
    """Of each token the negative log-likelihood in nats, and whether it is the likeliest one."""

    nll: Float32[Tensor, "*b"]
    hits: Bool[Tensor, "*b"]


class Head(nn.Linear):
    """From the last norm's answer to logits, or straight to the loss."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "*b c"],
        targets: Int64[Tensor, "*b"] | None = None,
        hits: bool = False,
    ) -> Float[Tensor, "*b v"] | Float32[Tensor, "*b"] | Judged:
        """Return logits, or the negative log-likelihood of targets; for evaluation, which follows
        no gradient, with `hits`: whether each target is the likeliest code."""
        if targets is None:
            return super().forward(x)
        rows, flat = x.flatten(0, -2), targets.flatten()
        size = max(1, LOGITS // self.out_features)
        parts = zip(rows.split(size), flat.split(size), strict=True)
        if hits:
            judged = [self._judged(*part) for part in parts]
            return Judged(
                *(torch.cat(part).view(targets.shape) for part in zip(*judged, strict=True))
            )
        if self.out_features < LARGE_VOCABULARY:
            return self._nll(rows, flat).view(targets.shape)
        # there is no randomness in it to be repeated, whose state the host would wait for
        nll = [
            checkpoint(self._nll, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.cat(nll).view(targets.shape)

    def _nll(self, x: Float[Tensor, "t c"], targets: Int64[Tensor, "t"]) -> Float32[Tensor, "t"]:
        return nll_of(super().forward(x), targets)

    def _judged(self, x: Float[Tensor, "t c"], targets: Int64[Tensor, "t"]) -> Judged:
        logits = super().forward(x)
        return Judged(nll_of(logits, targets), logits.argmax(-1) == targets)


class ZeroHead(StartsAtZero, Head):
    """A head whose first logits are all zero: each code is as likely as any other."""
