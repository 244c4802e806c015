"""Losses of the second stage: next-token prediction, and the noise that its inputs may get.

Source: arXiv 2012.09841, equation 11; the noise (`pkeep`) is the original implementation's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean negative log-likelihood, a scalar in nats per token, computed in fp32.

    logits [b, n, v] (any float), targets [b, n] int64; mask bool [b, n]: the tokens that count,
    None for all. Source: arXiv 2012.09841, equation 11.
    """
    if mask is None:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum().clamp(min=1)


def corrupt(tokens: Tensor, pkeep: float, chance: Tensor, noise: Tensor) -> Tensor:
    """Return tokens [b, n] in which each one stays with probability `pkeep`, else becomes noise.

    chance [b, n] is uniform on [0, 1), noise [b, n] int64 uniform over the vocabulary. They are
    arguments so that the result does not depend on the device or the rank. Only what the model
    reads is corrupted: the targets stay the true tokens.
    """
    return torch.where(chance < pkeep, tokens, noise)


def unigram_entropy(counts: Tensor) -> Tensor:
    """Return the entropy, in nats per token, of the code frequencies counts [v]: a scalar, fp64.

    It is the loss of the best model that ignores context, so a trained one must be below it.
    """
    probabilities = counts.double() / counts.sum()
    return torch.special.entr(probabilities).sum()
