"""What a scheme is: what is learned of an image's tokens, and how they are then generated.

Legend: b batch, n tokens of an image, m of its prefix, v vocabulary.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.blocks import KVCache
from taming_dist.models.prior.prefix import Prefix

LIKELIHOOD = "nll"  # the `measure` whose sum over an image's tokens is -log p(s | c)
Draws = Mapping[str, Tensor]
Choose = Callable[[Tensor, Tensor], Tensor]  # logits [b, v], uniforms [b] -> tokens [b] int64
Write = Callable[["Draft", KVCache], None]  # writes the next token of each image
Look = Callable[[Callable[[], "KnownTokens"]], None]  # is told after each step how to see tokens
Repeat = Callable[[Write, "Draft", KVCache, int, Look], Int64[Tensor, "b n"]]


class Network(Protocol):
    """What a scheme uses of a transformer (`models.prior.transformer.Transformer`)."""

    def __call__(self, tokens: Int64[Tensor, "b n"], prefix: Prefix) -> Float[Tensor, "b n v"]: ...
    def begin(
        self, prefix: Prefix, tokens: Int64[Tensor, "b t"] | None = None, once: bool = False
    ) -> tuple[Float[Tensor, "b v"], KVCache]: ...
    def step(self, tokens: Int64[Tensor, "b t"], cache: KVCache) -> Float[Tensor, "b v"]: ...
    def several(self, tokens: Int64[Tensor, "b t"], cache: KVCache) -> Float[Tensor, "b u v"]: ...


class Pair(NamedTuple):
    """What the transformer reads and what it is to say.

    `weights`: how much each token counts (None: all alike). In training they are 1 on average over
    the global batch, so that the loss does not depend on how it is cut into micro-batches.
    """

    inputs: Int64[Tensor, "b n"]
    targets: Int64[Tensor, "b n"]
    weights: Float[Tensor, "b n"] | None = None


class KnownTokens(NamedTuple):
    """What is known of the tokens that are to be generated, in their order.

    `tokens` [b, n] count where `mask` [b, n] says so, and are below the vocabulary there. The first
    `leading` ones are known of all images.
    """

    tokens: Int64[Tensor, "b n"]
    mask: Bool[Tensor, "b n"]
    leading: int = 0


class Draft(NamedTuple):
    """Images in the making, one token after the other, in tensors that are written in place.

    `tokens` [b, n] count up to `at` [1], and where they are `known` [b, n]; `uniforms` [b, n] are
    what they are drawn with. Where they are is known on the device only, so that writing the next
    one can be recorded in a CUDA graph.
    """

    tokens: Int64[Tensor, "b n"]
    known: Bool[Tensor, "b n"]
    uniforms: Float[Tensor, "b n"]
    at: Int64[Tensor, "1"]

    def put(self, logits: Float[Tensor, "b v"], choose: Choose) -> None:
        """Write the token at `at`, chosen from logits unless it is known."""
        chosen = choose(logits, self.uniforms.index_select(1, self.at).squeeze(1))
        before, known = (each.index_select(1, self.at) for each in (self.tokens, self.known))
        self.tokens.index_copy_(1, self.at, torch.where(known, before, chosen.unsqueeze(1)))

    def so_far(self) -> KnownTokens:
        """Return what is written or known, on the device, which is not waited for."""
        written = torch.arange(self.tokens.shape[1], device=self.at.device) <= self.at
        return KnownTokens(self.tokens.clone(), written | self.known)


def unwatched(so_far: Callable[[], KnownTokens]) -> None:
    """Look at nothing."""


def one_by_one(
    write: Write, draft: Draft, cache: KVCache, times: int, look: Look = unwatched
) -> Int64[Tensor, "b n"]:
    """Write so many tokens of each image, and return all of them."""
    for _ in range(times):
        write(draft, cache)
        look(draft.so_far)
    return draft.tokens


class Scheme(ABC):
    """How tokens are learned and generated; all random numbers are arguments.

    `causal`: no position sees a later one (else `mask` says what they see). `shift`: the logits of
    token k are those `shift` positions before it, so that many tokens at the end are not read.
    `extra_tokens`: how many other tokens the inputs may have, numbered from the vocabulary on (a
    mask, say). `measure`: the name of its mean negative log-likelihood of a token; `nll` is that of
    the paper, which added up over an image's tokens is -log p(s | c). `learned_positions`: each
    position has a learned embedding, whatever the kind of block.
    """

    name: str
    causal: ClassVar[bool]
    shift: ClassVar[int]
    extra_tokens: ClassVar[int] = 0
    measure: ClassVar[str] = LIKELIHOOD
    learned_positions: ClassVar[bool] = False

    def fault(self, shape: Sequence[int], order: str, unmasked: int) -> str | None:
        """Return a line, naming the key, if images cannot have codes of this shape in an order of
        that name, or the blocks not so many unmasked positions."""
        return None

    def image_grid(self, code_grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid [i, j] of an image's latents, from that of its codes."""
        return code_grid

    def groups(self, count: int) -> list[int]:
        """Return into how many parts, one after the other, an image's tokens fall, by the number of
        tokens of each: figures are given for each; none where there is but one."""
        return []

    def read(
        self,
        embedding: Callable[[Tensor], Tensor],
        tokens: Int64[Tensor, "b t"],
        first: int = 0,
    ) -> Float[Tensor, "b r c"]:
        """Return what the blocks read of an image's tokens, from the position `first` after the
        prefix on; `embedding` gives that of each token."""
        return embedding(tokens[:, first : tokens.shape[1] - self.shift])

    def where(self, places: Int64[Tensor, "*b n"]) -> Int64[Tensor, "*b r"]:
        """Return the place in the image grid of what stands at each position after the prefix, for
        tokens at these places."""
        return places

    def mask(self, prefix: int, device: torch.device) -> Bool[Tensor, "t t"] | None:
        """Return which positions each one sees, those of the prefix first, where not `causal` says
        it all."""
        return None

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
    def written(self, tokens: Int64[Tensor, "b n"], vocabulary: int) -> Int64[Tensor, "#b #n"]:
        """Return how many of its image's tokens are written when each of `tokens`, which a network
        reads all at once, is chosen."""

    def sampled_with(self, settings: Mapping[str, int | float]) -> "Scheme":
        """Return it with some of its settings as generation is asked to have them.

        Raises:
            UserError: it has no such setting.
        """
        for name in settings:
            if not hasattr(self, name):
                raise UserError(
                    f"{name}: a transformer of model/scheme={self.name} has no such setting, leave "
                    f"it out"
                )
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]

    @abstractmethod
    def uniforms(self, count: int) -> int:
        """How many random numbers, uniform on [0, 1), an image of `count` tokens takes."""

    @abstractmethod
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
        """Return `count` tokens for each prefix: those that are known as they are, and the others,
        below `vocabulary`, chosen by `choose`.

        uniforms: u are as many as `uniforms(count)` says. An image's tokens depend on its own
        prefix, uniforms and known tokens only, and the host never waits for the device. `repeat`
        writes what is written one token after the other. `look` is called after each step with a
        way to see the tokens that there are, and may end it all by an exception.
        """
