"""Differences of pixels."""

import dataclasses

from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.losses.terms.term import Networks, TermConfig


class L1(nn.Module):
    """Mean absolute difference over all elements: the pixel term of arXiv 2012.09841's code."""

    def forward(
        self, images: Float[Tensor, "b c h w"], reconstructions: Float[Tensor, "b c h w"]
    ) -> Float32[Tensor, ""]:
        return (images.float() - reconstructions.float()).abs().mean()


@dataclasses.dataclass
class L1Config(TermConfig):
    def build(self, networks: Networks) -> L1:
        return L1()


class L2(nn.Module):
    """Mean squared difference over all elements: the pixel term of arXiv 2012.09841, equation 4."""

    def forward(
        self, images: Float[Tensor, "b c h w"], reconstructions: Float[Tensor, "b c h w"]
    ) -> Float32[Tensor, ""]:
        return (images.float() - reconstructions.float()).square().mean()


@dataclasses.dataclass
class L2Config(TermConfig):
    def build(self, networks: Networks) -> L2:
        return L2()
