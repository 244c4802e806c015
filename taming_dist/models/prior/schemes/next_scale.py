"""VAR's scheme: all codes of a scale at once, from those of the scales before.

Source: arXiv 2404.02905, section 3. Legend: b batch, n tokens of an image, c width, v vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.errors import UserError
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
from taming_dist.models.scales import Scales, centres, check_scales, counts, mixing, starts, visible
from taming_dist.ranges import check_ranges, ranged


@dataclass
class NextScale(Scheme):
    """p(s | c) = prod_k p(s_k | s_<k, c) over the scales s_k of an image, whose tokens are
    independent given the scales before (equation 6).

    `scales`: those of the tokenizer (`model.quantizer.scales`). The first scale, of one token, is
    predicted at the end of the prefix. What stands for a token of any other is the sum of the
    embeddings of all tokens of earlier scales, interpolated as the tokenizer does it, at that
    token's place; attention sees the prefix and all scales up to the token's own.

    VAR embeds, linearly, the sum of the tokenizer's own vectors; here the transformer's embeddings
    of the codes are summed up, so that it needs nothing of the tokenizer. VAR adds an embedding of
    the place and one of the scale; here each place of each scale has one of its own.
    """

    scales: list[int] = ranged([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], at_least=1)
    name: str = "next_scale"
    causal: ClassVar[bool] = False
    shift: ClassVar[int] = 1
    learned_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, "model.scheme")
        check_scales("model.scheme.scales", self.scales)

    def fault(self, shape: Sequence[int], order: str, unmasked: int) -> str | None:
        count = sum(counts(self.scales))
        if list(shape) != [count]:
            return (
                f"model.scheme.scales={list(self.scales)}: these are [{count}] codes, but images "
                f"have {list(shape)}: give the scales of the tokenizer, which has to be one of "
                f"model/quantizer=multiscale"
            )
        if order != "raster":
            return f"model/order={order}: model/scheme=next_scale has its own order, leave it out"
        if unmasked:
            return (
                f"model.block.unmasked={unmasked}: with model/scheme=next_scale all of the prefix "
                f"sees itself, leave it out"
            )
        return None

    def image_grid(self, code_grid: tuple[int, int]) -> tuple[int, int]:
        return self.scales[-1], self.scales[-1]

    def groups(self, count: int) -> list[int]:
        return counts(self.scales)

    def read(
        self,
        embedding: Callable[[Tensor], Tensor],
        tokens: Int64[Tensor, "b t"],
        first: int = 0,
    ) -> Float[Tensor, "b r c"]:
        """Return what stands for the tokens after the first, up to the scale after `tokens`."""
        begin = starts(self.scales)
        scale = min(begin.index(tokens.shape[1]), len(self.scales) - 1)
        weights = mixing(self._scales, tokens.device)
        known = embedding(tokens[:, : begin[scale]])
        return weights[first : begin[scale + 1] - 1, : begin[scale]].to(known.dtype) @ known

    def where(self, places: Int64[Tensor, "*b n"]) -> Int64[Tensor, "r"]:
        return centres(self._scales, places.device)[1:]

    def mask(self, prefix: int, device: torch.device) -> Bool[Tensor, "t t"]:
        return visible(self._scales, prefix, device)

    def training_pair(self, tokens: Int64[Tensor, "b n"], draws: Draws, vocabulary: int) -> Pair:
        return Pair(tokens, tokens)

    def evaluation_pair(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Pair:
        return Pair(tokens, tokens)

    def written(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Int64[Tensor, "1 n"]:
        begin = torch.tensor(starts(self.scales)[:-1])
        first = begin.repeat_interleave(torch.tensor(counts(self.scales)))
        return to_device(first, tokens.device)[None]

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
        """A scale in one pass.

        Raises:
            UserError: some tokens are known.
        """
        if known is not None:
            raise UserError(
                "known: a transformer of model/scheme=next_scale writes whole images, whose codes "
                "are not of parts: leave it out"
            )
        logits, cache = network.begin(prefix)
        tokens = choose(logits, uniforms[:, 0])[:, None]
        while True:
            look(partial(_so_far, tokens, count))
            done = tokens.shape[1]
            if done == count:
                return tokens
            logits = network.several(tokens, cache)
            drawn = uniforms[:, done : done + logits.shape[1]]
            chosen = choose(logits.flatten(0, 1), drawn.flatten())
            tokens = torch.cat([tokens, chosen.view_as(drawn)], 1)

    @property
    def _scales(self) -> Scales:
        return tuple(self.scales)


def _so_far(tokens: Int64[Tensor, "b t"], count: int) -> KnownTokens:
    """The tokens of the first scales among all."""
    missing = count - tokens.shape[1]
    whole = F.pad(tokens, (0, missing))
    mask = torch.arange(count, device=tokens.device) < tokens.shape[1]
    return KnownTokens(whole, mask.expand_as(whole))
