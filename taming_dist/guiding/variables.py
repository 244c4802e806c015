"""What is optimised: latents that are quantized, or a distribution over the codes of each place.

Both are drawn from to entries of the codebook, so that the decoder reads nothing else, and pass the
gradient at these straight on. Legend: d latent channels, i j latent grid, K codes, N = i*j places.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming_dist.models.quantizers.interface import Quantizer, nearest, straight_through

TINY = torch.finfo(torch.float32).tiny
SURENESS = 0.5  # probability of the code that a place begins with
MOST_CODES = 2**20  # of a codebook, all of whose entries are listed here


@dataclass(frozen=True)
class Codebook:
    """The entries [K, d] that the decoder of a VQGAN reads, by their codes."""

    entries: Tensor

    @classmethod
    def of(cls, quantizer: Quantizer, device: torch.device) -> "Codebook":
        """Those of any quantizer."""
        codes = torch.arange(quantizer.vocabulary, device=device)
        with torch.no_grad():
            return cls(quantizer.lookup(codes[None, :, None])[0, :, :, 0].T.contiguous())

    @property
    def scale(self) -> Tensor:
        """Standard deviation [d] of each channel."""
        return self.entries.std(0, correction=0).clamp_min(TINY)


class Variable(ABC):
    """What is optimised of a picture that begins as `codes` [i, j]. Its one parameter is in the
    units of `Codebook.scale`, or in nats, so that one learning rate serves any codebook."""

    parameter: nn.Parameter

    def __init__(self, codebook: Codebook, codes: Tensor) -> None:
        self.codebook, self.grid = codebook, tuple(codes.shape)
        self.start = codebook.entries[codes.flatten()] / codebook.scale

    @abstractmethod
    def draw(self, temperature: float, generator: torch.Generator) -> Tensor:
        """Entries [1, d, i, j] with a gradient to the parameter."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Where the parameter stands among the entries, [N, d] in units of `Codebook.scale`."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The codes [i, j] of the picture as it is now."""

    @abstractmethod
    def bound(self) -> None:
        """Keep the parameter where there are entries; after each step."""

    def pull(self) -> Tensor:
        """The mean square [] of the distance from the start, in units of `Codebook.scale`."""
        return (self.mean() - self.start).square().mean()

    def _as_grid(self, vectors: Tensor) -> Tensor:
        i, j = self.grid
        return rearrange(vectors, "(i j) d -> 1 d i j", i=i, j=j)


class Latents(Variable):
    """A vector for each place, whose nearest entry is decoded; the gradient at the entry is the
    vector's (straight-through). Kept within the range of the entries, channel by channel.

    Source: arXiv 2204.08583, section 3; the estimator: arXiv 1711.00937, section 3.2.
    """

    def __init__(self, codebook: Codebook, codes: Tensor) -> None:
        super().__init__(codebook, codes)
        self.parameter = nn.Parameter(self.start.clone())
        scaled = codebook.entries / codebook.scale
        self.low, self.high = scaled.amin(0), scaled.amax(0)

    def draw(self, temperature: float, generator: torch.Generator) -> Tensor:
        vectors = self.parameter * self.codebook.scale
        chosen = nearest(vectors.detach(), self.codebook.entries)
        return self._as_grid(straight_through(vectors, self.codebook.entries[chosen]))

    def mean(self) -> Tensor:
        return self.parameter

    def codes(self) -> Tensor:
        vectors = self.parameter.detach() * self.codebook.scale
        return nearest(vectors, self.codebook.entries).view(self.grid)

    @torch.no_grad()
    def bound(self) -> None:
        self.parameter.clamp_(self.low, self.high)


class Codes(Variable):
    """Logits [N, K] over the codes of each place, of which one is drawn in each step; the gradient
    is that of the relaxed draw, at a temperature that sinks.

    Source: Gumbel-softmax, arXiv 1611.01144, section 2.2.
    """

    def __init__(self, codebook: Codebook, codes: Tensor) -> None:
        super().__init__(codebook, codes)
        count = len(codebook.entries)
        odds = SURENESS / (1 - SURENESS) * max(1, count - 1)
        first = F.one_hot(codes.flatten(), count).float()
        self.parameter = nn.Parameter(first * torch.tensor(odds).log().item())

    def draw(self, temperature: float, generator: torch.Generator) -> Tensor:
        waits = torch.empty_like(self.parameter).exponential_(generator=generator)
        noisy = (self.parameter - waits.clamp_min(TINY).log()) / temperature
        entries = self.codebook.entries
        relaxed = noisy.softmax(-1) @ entries
        return self._as_grid(straight_through(relaxed, entries[noisy.argmax(-1)]))

    def mean(self) -> Tensor:
        return self.parameter.softmax(-1) @ (self.codebook.entries / self.codebook.scale)

    def codes(self) -> Tensor:
        return self.parameter.detach().argmax(-1).view(self.grid)

    def bound(self) -> None:
        """Nothing: every distribution is one of entries."""


VARIABLES: dict[str, type[Variable]] = {"latents": Latents, "codes": Codes}
