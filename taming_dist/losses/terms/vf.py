"""VF loss: latents that say what the features of a vision foundation model say.

Source: Yao et al., arXiv 2501.01423 (VA-VAE), section 3.2; margins as in its authors' code, where
both parts read the projected latents.

Legend: b batch, c channels, h w pixels, e channels of the features, i j latent grid, n positions.
"""

import dataclasses

import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from taming_dist.exact import without_autocast
from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.terms.published import PublishedConfig
from taming_dist.losses.terms.term import LATENTS, Networks, ProjectedTerm
from taming_dist.ranges import ranged


class VF(ProjectedTerm):
    """How far latents and features point apart at each position, and how far the similarities
    between the positions of an image differ; either only beyond its margin."""

    def __init__(
        self, network: FrozenNetwork, cosine_margin: float, distance_margin: float
    ) -> None:
        super().__init__()
        self.network, self.width = network, network.width
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin

    def forward(
        self, images: Float[Tensor, "b c h w"], latents: Float[Tensor, "b e i j"]
    ) -> Float32[Tensor, ""]:
        with without_autocast(images.device):
            i, j = latents.shape[2:]
            features = directions(self.network.features(images, (i, j)))
            ours = directions(latents.float())
            cosine = (ours * features).sum(1)
            difference = similarities(ours) - similarities(features)
            return (
                F.relu(1 - self.cosine_margin - cosine).mean()
                + F.relu(difference.abs() - self.distance_margin).mean()
            )


def directions(grid: Float32[Tensor, "b e i j"]) -> Float32[Tensor, "b e n"]:
    """The vector at each position, of length one."""
    return F.normalize(grid.flatten(2), dim=1)


def similarities(vectors: Float32[Tensor, "b e n"]) -> Float32[Tensor, "b n n"]:
    """The cosine of every two positions of an image."""
    return vectors.transpose(1, 2) @ vectors


@dataclasses.dataclass
class VFConfig(PublishedConfig):
    """`size`: pixels across to which images are resized for the network. `cosine_margin`,
    `distance_margin`: what costs nothing of a distance 1 - cosine, and of a difference between two
    similarities."""

    looks_into = LATENTS

    weight: float = ranged(0.1, at_least=0)  # the source's, before its adaptive weight
    network: str = "vit_small_patch14_dinov2.lvd142m"
    size: int = ranged(224, at_least=16)
    cosine_margin: float = ranged(0.5, at_least=0, at_most=2)
    distance_margin: float = ranged(0.25, at_least=0, at_most=2)

    def build(self, networks: Networks) -> VF:
        network = self.opened(networks, self.size)
        return VF(network, self.cosine_margin, self.distance_margin)
