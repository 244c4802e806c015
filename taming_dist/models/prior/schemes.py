"""What the transformer learns to predict of an image's tokens, and how it then writes an image.

A scheme is a class and one line in SCHEMES, by the name that `model/scheme=` has.
Legend: b batch, n tokens of an image, m of its prefix, v vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from taming_dist.losses.tokens import corrupt
from taming_dist.models.prior.blocks import KVCache
from taming_dist.ranges import check_ranges, ranged

Draws = Mapping[str, Tensor]
Choose = Callable[[Tensor, Tensor], Tensor]  # logits [b, v], uniforms [b] -> tokens [b] int64


class Network(Protocol):
    """What a scheme uses of a transformer (`models.prior.transformer.Transformer`)."""

    def __call__(
        self, tokens: Int64[Tensor, "b n"], prefix: Int64[Tensor, "b m"]
    ) -> Float[Tensor, "b n v"]: ...
    def cache(self, batch: int) -> KVCache: ...
    def step(self, tokens: Int64[Tensor, "b t"], cache: KVCache) -> Float[Tensor, "b v"]: ...


class Pair(NamedTuple):
    """What the transformer reads and what it is to say; `mask`: which tokens count (None: all)."""

    inputs: Int64[Tensor, "b n"]
    targets: Int64[Tensor, "b n"]
    mask: Bool[Tensor, "b n"] | None = None


class Scheme(ABC):
    """How tokens are learned and generated; all random numbers are arguments.

    `causal`: no position sees a later one. `shift`: the logits of token k are those `shift`
    positions before it, so that many tokens at the end are not read. `extra_tokens`: how many other
    tokens the inputs may have, numbered from the vocabulary on (a mask, say).
    """

    causal: ClassVar[bool]
    shift: ClassVar[int]
    extra_tokens: ClassVar[int] = 0

    def draw(
        self, shape: tuple[int, int], vocabulary: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return what `training_pair` needs for tokens of a shape [b, n], by name, a row an image:
        on the CPU, for a whole global batch, so that it does not depend on ranks or devices."""
        return {}

    @abstractmethod
    def training_pair(self, tokens: Int64[Tensor, "b n"], draws: Draws, vocabulary: int) -> Pair:
        """Return what is learned of tokens with the rows of `draw` that are theirs."""

    @abstractmethod
    def evaluation_pair(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Pair:
        """Return what is measured on tokens, the same every time."""

    @abstractmethod
    def uniforms(self, count: int) -> int:
        """How many random numbers, uniform on [0, 1), an image of `count` tokens takes."""

    @abstractmethod
    def generate(
        self,
        network: Network,
        prefix: Int64[Tensor, "b m"],
        count: int,
        choose: Choose,
        uniforms: Float[Tensor, "b u"],
    ) -> Int64[Tensor, "b {count}"]:
        """Return `count` tokens for each prefix, chosen by `choose`.

        uniforms: u are as many as `uniforms(count)` says.
        """


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
        prefix: Int64[Tensor, "b m"],
        count: int,
        choose: Choose,
        uniforms: Float[Tensor, "b u"],
    ) -> Int64[Tensor, "b {count}"]:
        cache = network.cache(len(prefix))
        tokens = torch.empty(len(prefix), count, dtype=torch.int64, device=prefix.device)
        read = prefix
        for k in range(count):
            tokens[:, k] = choose(network.step(read, cache), uniforms[:, k])
            read = tokens[:, k : k + 1]
        return tokens


# name in conf/model/scheme -> the scheme; the first is the default
SCHEMES: dict[str, type[Scheme]] = {
    "next_index": NextIndex,
}
