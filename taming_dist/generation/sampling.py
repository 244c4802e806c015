"""How the next code is chosen from logits: temperature, top-k, top-p, a draw from given uniforms.

Source: arXiv 2012.09841, section 4 (top-k sampling); top-p is nucleus sampling, arXiv
1904.09751, section 3.1. All randomness comes in as numbers, those of `generation.draws`, so that
image k of a seed is the same in any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from taming_dist.ranges import check_ranges, ranged

UNITS = 2**52  # of probability, in sums of 63 bits


@dataclass(frozen=True)
class Sampling:
    """The knobs of decoding: temperature (0: always the likeliest code), top-k, top-p, guidance.

    `top_k` None or 0 and `top_p` None are off; each works without the other; top-p counts the
    probability that top-k has left. `guidance` 1 is off. `steps` and `choice_temperature` are those
    of the masked scheme (`models.prior.schemes.masked`), None: the model's own.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = ranged(1.0, at_least=0)
    top_k: int | None = ranged(None, at_least=0)
    top_p: float | None = ranged(None, above=0, at_most=1)
    guidance: float = ranged(1.0, at_least=0)
    steps: int | None = ranged(None, at_least=1)
    choice_temperature: float | None = ranged(None, at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def of_scheme(self) -> dict[str, int | float]:
        """The settings of the scheme that differ from the model's own, by name."""
        found = {"steps": self.steps, "choice_temperature": self.choice_temperature}
        return {name: value for name, value in found.items() if value is not None}

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return one token each [b] int64 from logits [b, v] and uniforms [b] in [0, 1)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.double() / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits, uniforms)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits [b, v] with all but the k largest at -inf; ties with the k-th stay too."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits [b, v] with -inf outside the smallest set of likeliest tokens that reaches p.

    Source: arXiv 1904.09751, equation 2. The likeliest token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    shares = in_whole_numbers(ordered.softmax(dim=-1))
    outside = shares.cumsum(dim=-1) - shares >= round(p * UNITS)
    return logits.masked_fill(outside.gather(-1, order.argsort(dim=-1)), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token [b] int64 at which the cumulative probability passes the uniform number.

    logits [b, v], uniforms [b] in [0, 1). In fp64: a fp32 sum over 16,384 codes would shift draws.
    """
    cumulative = in_whole_numbers(logits.double().softmax(dim=-1)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may lift u * total to the total itself, past every token.
    passed = torch.minimum((uniforms.double().unsqueeze(1) * total).long(), total - 1)
    return torch.searchsorted(cumulative, passed, right=True).squeeze(1)


def in_whole_numbers(probabilities: Tensor) -> Tensor:
    """Return fp64 probabilities as int64 multiples of 2^-52.

    Their sums do not depend on the order, so they are the same on the CPU, on a GPU and each time.
    """
    return (probabilities * UNITS).round().long()
