"""What every term of the reconstruction loss has: a config class, and a module that it builds."""

import dataclasses
from typing import ClassVar, Protocol

from torch import nn

from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.perceptual import LPIPS
from taming_dist.ranges import check_ranges, ranged


class Networks(Protocol):
    """Where a term gets its frozen networks from: the functions of `taming_dist.pretrained`."""

    def lpips_network(self, net: str, weights: str) -> LPIPS: ...

    def timm_network(self, name: str, path: str, sha256: str, size: int) -> FrozenNetwork: ...


LATENTS, DECODER = "latents", "decoder"


@dataclasses.dataclass
class TermConfig:
    """A term and its weight. With weight 0 it is not computed. `looks_into`: what of the
    model its `ProjectedTerm` is about; empty: it is about reconstructions."""

    looks_into: ClassVar[str] = ""

    weight: float = ranged(1.0, at_least=0)

    def check(self, key: str) -> None:
        """UserError for a value that means nothing; `key` is where the config stands."""
        check_ranges(self, key)

    def check_size(self, size: int) -> None:
        """UserError if images of so many pixels across will not do."""

    def build(self, networks: Networks) -> nn.Module:
        """The term: a module that is called with images and reconstructions, about [-1, 1]; or a
        `ProjectedTerm`."""
        raise NotImplementedError


class ProjectedTerm(nn.Module):
    """A term that is called with images and, instead of reconstructions, a trained linear map of
    what its config looks into, to `width` channels: the latents before they are quantized
    (`LATENTS`), or the decoder's features at their resolution (`DECODER`)."""

    width: int
