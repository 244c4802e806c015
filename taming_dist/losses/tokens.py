"""Losses of the second stage: next-token prediction, and the noise that its inputs may get.

Source: arXiv 2012.09841, equation 11; the noise (`pkeep`) is the original implementation's.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64, Num
from torch import Tensor


def token_nll(
    logits: Float[Tensor, "b n v"],
    targets: Int64[Tensor, "b n"],
    weights: Float[Tensor, "b n"] | None = None,
) -> Float32[Tensor, ""]:
    """Return the mean negative log-likelihood in nats per token, computed in fp32.

    `weights`: as `mean_of` takes them. Source: arXiv 2012.09841, equation 11.
    """
    each = nll_of(logits.flatten(0, 1), targets.flatten())
    return mean_of(each.view(targets.shape), weights)


def nll_of(logits: Float[Tensor, "t v"], targets: Int64[Tensor, "t"]) -> Float32[Tensor, "t"]:
    """Return the negative log-likelihood of each target in nats, computed in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def mean_of(
    nll: Float32[Tensor, "b n"], weights: Float[Tensor, "b n"] | None = None
) -> Float32[Tensor, ""]:
    """Return the mean over the tokens; weights are 1 on average over a global batch, None for 1."""
    return nll.mean() if weights is None else (nll * weights).mean()


def corrupt(
    tokens: Int64[Tensor, "b n"],
    pkeep: float,
    chance: Float[Tensor, "b n"],
    noise: Int64[Tensor, "b n"],
) -> Int64[Tensor, "b n"]:
    """Return tokens in which each one stays with probability `pkeep`, else becomes noise.

    chance is uniform on [0, 1), noise uniform over the vocabulary. They are
    arguments so that the result does not depend on the device or the rank. Only what the model
    reads is corrupted: the targets stay the true tokens.
    """
    return torch.where(chance < pkeep, tokens, noise)


def unigram_entropy(counts: Num[Tensor, "v"]) -> Float64[Tensor, ""]:
    """Return the entropy, in nats per token, of the code frequencies counts.

    It is the loss of the best model that ignores context, so a trained one must be below it.
    """
    probabilities = counts.double() / counts.sum()
    return torch.special.entr(probabilities).sum()
