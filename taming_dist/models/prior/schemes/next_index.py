"""The paper's scheme: each token is predicted from those before it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from taming_dist.losses.tokens import corrupt
from taming_dist.models.prior.blocks import KVCache
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes.interface import (
    Choose,
    Draft,
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

    def written(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Int64[Tensor, "1 n"]:
        return torch.arange(tokens.shape[1], device=tokens.device)[None]

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
        repeat: Repeat = one_by_one,
        look: Look = unwatched,
    ) -> Int64[Tensor, "b {count}"]:
        if known is None:
            nothing = torch.zeros(len(prefix), count, dtype=torch.int64, device=prefix.device)
            known = KnownTokens(nothing, nothing > 0)
        if known.leading == count:
            return known.tokens
        first = torch.full((1,), known.leading, device=prefix.device)
        draft = Draft(known.tokens.clone(), known.mask, uniforms, first)
        logits, cache = network.begin(prefix, known.tokens[:, : known.leading])
        draft.put(logits, choose)
        look(draft.so_far)

        def write(draft: Draft, cache: KVCache) -> None:
            logits = network.step(draft.tokens.index_select(1, draft.at), cache)
            draft.at.add_(1)
            draft.put(logits, choose)

        return repeat(write, draft, cache, count - known.leading - 1, look)
