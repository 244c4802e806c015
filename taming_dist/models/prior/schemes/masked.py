"""MaskGIT's scheme: tokens that are masked are told from all others, and many are written at once.

Source: arXiv 2202.04200. Legend: b batch, n tokens of an image, v vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes.interface import (
    Choose,
    Draws,
    KnownTokens,
    Look,
    Network,
    Pair,
    Repeat,
    Scheme,
    one_by_one,
    unwatched,
)
from taming_dist.ranges import check_ranges, ranged

EVALUATED = 16  # masks that images are evaluated with
SMALLEST = 2.0**-53  # of the uniform numbers above 0
LOGITS = 2**26  # at once, or those of an image: 256 MiB in fp32


@dataclass
class Masked(Scheme):
    """Attention reads both ways, and the masked tokens are predicted from those that are not.

    Training masks a share cos(pi / 2 * u) of each image's tokens, u uniform (section 3.1, the
    cosine schedule of section 3.3), and only they count. Its loss, and what validation measures as
    `masked_nll`, is no likelihood of the image: never compare it with the next index's `nll`.

    Generation starts with all tokens masked that are not known. In each of `steps` steps (no more
    than tokens) all masked ones are chosen, those that the network is surest of stay, and the
    others are masked again: of an image's u unknown ones u cos(pi / 2 * t / steps) after step t,
    rounded down (sections 3.2 and 3.3). How sure it is: the chosen token's log-probability, before
    the sampling temperature, top-k and top-p but with guidance, plus Gumbel noise times a
    temperature that falls linearly from `choice_temperature` to 0 (the authors' code, whose value
    is 4.5).

    The label smoothing of section 4.1 is left out: the loss is the likelihood of the masked tokens,
    in training as in validation.
    """

    steps: int = ranged(8, at_least=1, may_change=True, compared=False)
    choice_temperature: float = ranged(4.5, at_least=0, may_change=True, compared=False)
    name: str = "masked"
    causal: ClassVar[bool] = False
    shift: ClassVar[int] = 0
    extra_tokens: ClassVar[int] = 1  # the mask, numbered as the vocabulary is large
    measure: ClassVar[str] = "masked_nll"

    def __post_init__(self) -> None:
        check_ranges(self, "model.scheme")

    def draw(
        self, shape: tuple[int, int], vocabulary: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        images, count = shape
        shares = torch.rand(images, generator=generator, dtype=torch.float64)
        masked = (count * torch.cos(math.pi / 2 * shares)).ceil().long().clamp(1, count)
        weight = (count * images / masked.sum()).float()  # so that all masked tokens count alike
        return {
            "masked": masked,
            "weight": weight.expand(images),
            "score": torch.rand(shape, generator=generator),
        }

    def training_pair(self, tokens: Int64[Tensor, "b n"], draws: Draws, vocabulary: int) -> Pair:
        mask = ranks(draws["score"]) < draws["masked"][:, None]
        return Pair(tokens.masked_fill(mask, vocabulary), tokens, mask * draws["weight"][:, None])

    def evaluation_pair(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Pair:
        """Return what is measured on tokens: each image has one of `EVALUATED` masks, which mask
        shares of the cosine schedule at equal distances, and its codes decide which."""
        masks = to_device(evaluated_masks(tokens.shape[1]), tokens.device)
        mask = masks[tokens.sum(1) % EVALUATED]
        return Pair(tokens.masked_fill(mask, vocabulary), tokens, mask.float())

    def written(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Int64[Tensor, "b 1"]:
        return (tokens < vocabulary).sum(1, keepdim=True)

    def uniforms(self, count: int) -> int:
        # for each step, and all tokens: one to choose it by, one for the noise
        return 2 * count * self._steps(count)

    def generate(
        self,
        network: Network,
        prefix: Prefix,
        count: int,
        vocabulary: int,
        choose: Choose,
        uniforms: Float[Tensor, "b u"],
        known: KnownTokens | None = None,
        repeat: Repeat = one_by_one,
        look: Look = unwatched,
    ) -> Int64[Tensor, "b {count}"]:
        steps = self._steps(count)
        drawn = uniforms.unflatten(1, (steps, 2, count))
        tokens = torch.full((len(prefix), count), vocabulary, device=prefix.device)
        masked = torch.ones_like(tokens, dtype=torch.bool)
        if known is not None:
            tokens, masked = known.tokens, ~known.mask
        images = max(1, LOGITS // (count * vocabulary))
        parts = [slice(at, at + images) for at in range(0, len(prefix), images)]
        prefixes = [prefix.rows(part) for part in parts]

        def written(part: slice, prefix: Prefix, step: int) -> tuple[Tensor, Tensor]:
            """The tokens of some images with the masked ones chosen, and their log-probability."""
            before, hidden = tokens[part], masked[part]
            logits = network(before.masked_fill(hidden, vocabulary), prefix)
            chosen = choose(logits.flatten(0, 1), drawn[part, step, 0].flatten()).view_as(before)
            after = torch.where(hidden, chosen, before)
            return after, log_probability(logits, after)

        for step, left in enumerate(still_masked(masked.sum(1), steps)):
            found = [written(*each, step) for each in zip(parts, prefixes, strict=True)]
            tokens, sureness = (torch.cat(each) for each in zip(*found, strict=True))
            temperature = self.choice_temperature * (1 - (step + 1) / steps)
            sureness = sureness + temperature * gumbel(drawn[:, step, 1])
            # what is no longer masked is the surest, and stays
            masked = ranks(sureness.masked_fill(~masked, torch.inf)) < left[:, None]
            look(partial(KnownTokens, tokens, ~masked))
        return tokens

    def _steps(self, count: int) -> int:
        return min(self.steps, count)


def still_masked(unknown: Int64[Tensor, "b"], steps: int) -> list[Int64[Tensor, "b"]]:
    """Return how many tokens of each image, of those that are unknown at first, are masked after
    each step.

    Source: arXiv 2202.04200, section 3.3; every step writes one at least, as in the authors' code,
    until none is left.
    """
    left = [unknown]
    for step in range(1, steps + 1):
        wanted = unknown.double() * math.cos(math.pi / 2 * step / steps)
        left.append(torch.minimum(wanted.floor().long(), left[-1] - 1).clamp(min=0))
    return left[1:]


def ranks(values: Float[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
    """Return how many values of the row are smaller; of equal ones, the first counts as smaller."""
    return values.argsort(dim=-1, stable=True).argsort(-1)


def gumbel(uniforms: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Return Gumbel noise from uniform numbers on [0, 1)."""
    return -(-uniforms.clamp(min=SMALLEST).log()).log()


def log_probability(
    logits: Float[Tensor, "b n v"], tokens: Int64[Tensor, "b n"]
) -> Float[Tensor, "b n"]:
    """Return the log-probability that the logits give each token."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def evaluated_masks(count: int) -> Bool[Tensor, "masks {count}"]:
    """Return the masks of `count` tokens that images are evaluated with, on the CPU."""
    shares = (torch.arange(EVALUATED, dtype=torch.float64) + 0.5) / EVALUATED
    masked = (count * torch.cos(math.pi / 2 * shares)).ceil()
    generator = torch.Generator().manual_seed(0)
    return ranks(torch.rand(EVALUATED, count, generator=generator)) < masked[:, None]
