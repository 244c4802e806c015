"""How the next code is chosen from logits: guidance, temperature, top-k, top-p, a draw from given
uniforms.

Source: arXiv 2012.09841, section 4 (top-k sampling); top-p is nucleus sampling, arXiv
1904.09751, section 3.1. All randomness comes in as numbers, those of `generation.draws`, so that
image k of a seed is the same in any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.generation.decoding import Decoding
from taming_dist.generation.guidance import SCHEDULES, Guided
from taming_dist.generation.precision import network_of
from taming_dist.models.prior.schemes import Network
from taming_dist.models.prior.transformer import Transformer

UNITS = 2**52  # of probability, in sums of 63 bits
LOGITS = 2**22  # at once: 32 MiB in fp64
COLDEST = 1e-200  # below it logits that are divided by it may be infinite


@dataclass
class Sampling(Decoding):
    """How codes are drawn with the settings of `Decoding`."""

    @property
    def of_scheme(self) -> dict[str, int | float]:
        """The settings of the scheme that differ from the model's own, by name."""
        found = {"steps": self.steps, "choice_temperature": self.choice_temperature}
        return {name: value for name, value in found.items() if value is not None}

    def network(self, transformer: Transformer) -> Network:
        """Return the transformer, under guidance unless its scale is 1 everywhere."""
        network = network_of(transformer)
        if self.guidance == 1:
            return network
        scales = self.guidance_scales(transformer.config.num_tokens)
        return Guided(network, to_device(scales, transformer.device), transformer.scheme)

    def guidance_scales(self, count: int) -> Tensor:
        """Return the scale [n] of guidance at each of an image's `count` codes, on the CPU."""
        progress = torch.arange(count, dtype=torch.float64) / count
        share = SCHEDULES[self.guidance_schedule](progress, self.guidance_power)
        return (1 + (self.guidance - 1) * share).float()

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return one token each [b] int64 from logits [b, v] and uniforms [b] in [0, 1)."""
        if self.temperature < COLDEST:  # the likeliest code has all of the probability
            return logits.argmax(dim=-1)
        rows = max(1, LOGITS // logits.shape[-1])
        parts = zip(logits.split(rows), uniforms.split(rows), strict=True)
        chosen = [self._drawn(*part) for part in parts]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _drawn(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        scaled = logits.double() / self.temperature
        return draw(truncated(scaled, self.top_k, self.top_p), uniforms)


def truncated(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return logits [b, v] fp64 with -inf outside of the k largest, and of these outside of the
    smallest set of likeliest tokens that reaches the probability p (arXiv 1904.09751, equation 2).

    The likeliest token always stays, and so do all that are as likely as the last one that does:
    which of them a device would sort first counts nowhere. With k nothing else is sorted.
    """
    if not top_k and top_p is None:
        return logits
    if top_k:
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values
        logits = logits.masked_fill(logits < best[:, -1:], -torch.inf)
    else:
        best = logits.sort(dim=-1, descending=True).values
    if top_p is None:
        return logits
    shares = in_whole_numbers((best - logits.logsumexp(dim=-1, keepdim=True)).exp())
    before = shares.cumsum(dim=-1) - shares
    last = (before < max(1, round(top_p * UNITS))).sum(dim=-1, keepdim=True) - 1
    return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)


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
