"""The paper's scheme: each token is predicted from those before it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from taming_dist.losses.tokens import corrupt
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes.interface import (
    Choose,
    Draws,
    KnownTokens,
    Network,
    Pair,
    Scheme,
)
from taming_dist.ranges import check_ranges, ranged


@dataclass
class NextIndex(Scheme):
    """One token after the other: p(s | c) = prod_k p(s_k | s_<k, c).

    `pkeep`: probability that an input code is kept in training; else it is replaced by a random one
    (the original implementation's noise). Source: arXiv 2012.09841, section 3.2, equation 11.
    """

    pkeep: float = ranged(1.0, above=0, at_most=1, may_change=True, compared=False)
    name: str = "next_index"
    causal: ClassVar[bool] = True
    shift: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_ranges(self, "model.scheme")

    def draw(
        self, shape: tuple[int, int], vocabulary: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.pkeep == 1:
            return {}
        chance = torch.rand(shape, generator=generator)
        return {"chance": chance, "noise": torch.randint(vocabulary, shape, generator=generator)}

    def training_pair(self, tokens: Int64[Tensor, "b n"], draws: Draws, vocabulary: int) -> Pair:
        if self.pkeep == 1:
            return Pair(tokens, tokens)
        return Pair(corrupt(tokens, self.pkeep, draws["chance"], draws["noise"]), tokens)

    def evaluation_pair(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Pair:
        return Pair(tokens, tokens)

    def uniforms(self, count: int) -> int:
        return count

    def generate(
        self,
        network: Network,
        prefix: Prefix,
        count: int,
        vocabulary: int,
        choose: Choose,
        uniforms: Float[Tensor, "b u"],
        known: KnownTokens | None = None,
    ) -> Int64[Tensor, "b {count}"]:
        tokens = torch.empty(len(prefix), count, dtype=torch.int64, device=prefix.device)
        first = 0
        if known is not None:
            tokens, first = known.tokens.clone(), known.leading
        if first == count:
            return tokens
        logits, cache = network.begin(prefix, tokens[:, :first])
        for k in range(first, count):
            if k > first:
                logits = network.step(tokens[:, k - 1 : k], cache)
            chosen = choose(logits, uniforms[:, k])
            if known is not None:
                chosen = torch.where(known.mask[:, k], tokens[:, k], chosen)
            tokens[:, k] = chosen
        return tokens
