"""How well a second stage predicts a set of codes. Source: arXiv 2012.09841, equation 11.

Legend: b batch, n tokens, v vocabulary.
"""

import torch
from torch import Tensor

from taming_dist.losses.tokens import token_nll, unigram_entropy


class TokenMetrics:
    """Sums over batches of codes, and the metrics that follow from them.

    `sums` is one fp64 tensor that may be added over the ranks (one all-reduce) before `compute`.
    """

    def __init__(self, vocabulary: int) -> None:
        # summed negative log-likelihood, then uses per code
        self.sums = torch.zeros(1 + vocabulary, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Add the logits [b, n, v] that a model gave for targets [b, n] int64; mask bool [b, n]:
        the tokens that count, None for all."""
        self.sums = self.sums.to(logits.device)
        counted = targets.new_ones(targets.shape) if mask is None else mask.to(targets.dtype)
        nll = token_nll(logits, targets, mask).double()
        self.sums[0] += nll * (targets.numel() if mask is None else mask.sum())
        self.sums[1:].index_add_(0, targets.flatten(), counted.flatten().double())

    def compute(self) -> dict[str, float]:
        """Return `val_nll`, and `unigram_entropy` that it has to stay below; nats per token."""
        counts = self.sums[1:]
        assert counts.sum() > 0, "no batch was given"
        return {
            "val_nll": float(self.sums[0] / counts.sum()),
            "unigram_entropy": float(unigram_entropy(counts)),
        }
