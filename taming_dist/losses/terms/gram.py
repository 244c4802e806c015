"""Which features of a frozen network occur together, wherever that is: textures.

Source: the style loss of arXiv 1508.06576, between an image and its reconstruction, on the features
that LPIPS compares.

Legend: b batch, c channels, h w pixels.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from taming_dist.exact import without_autocast
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.terms.perceptual import Perceptual, PerceptualConfig
from taming_dist.losses.terms.term import Networks
from taming_dist.ranges import check_choice

Difference = Callable[[Float32[Tensor, "b c c"]], Float32[Tensor, "b"]]

# Sums over an axis at least, no means: however many channels, a Gram matrix has trace one
NORMS: dict[str, Difference] = {
    "l1": lambda difference: difference.abs().sum(1).mean(1),
    "l2": lambda difference: difference.square().sum((1, 2)),
}


class Gram(Perceptual):
    """How the Gram matrices differ, added up over the layers; mean over the images.

    Features have length one in each pixel, as for LPIPS, so that layers count alike.
    """

    def __init__(self, lpips: LPIPS, norm: str) -> None:
        super().__init__(lpips)
        self.norm = NORMS[norm]

    def forward(
        self, images: Float[Tensor, "b c h w"], reconstructions: Float[Tensor, "b c h w"]
    ) -> Float32[Tensor, ""]:
        network = self.lpips if self.in_half is None else self.in_half
        with torch.no_grad():
            real = network.layers(images)
        layers = zip(real, network.layers(reconstructions), strict=True)
        with without_autocast(images.device):
            each = [self.norm(gram(a) - gram(b)) for a, b in layers]
            return torch.stack(each).sum(0).mean()


def gram(features: Float32[Tensor, "b c h w"]) -> Float32[Tensor, "b c c"]:
    """The mean over an image's pixels of every product of two channels."""
    vectors = features.flatten(2)
    return vectors @ vectors.transpose(1, 2) / vectors.shape[2]


@dataclasses.dataclass
class GramConfig(PerceptualConfig):
    """`norm`: l1, the mean over rows of the absolute differences in a row, or l2, the squared
    Frobenius norm."""

    norm: str = "l2"

    def check(self, key: str) -> None:
        super().check(key)
        check_choice(f"{key}.norm", self.norm, NORMS)

    def build(self, networks: Networks) -> Gram:
        return Gram(networks.lpips_network(self.net, self.weights), self.norm)
