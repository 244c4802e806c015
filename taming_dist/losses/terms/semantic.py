"""Decoder features that say what those of a frozen vision foundation model say.

Source: the semantic regularization of GigaTok (arXiv 2504.08736, section 4.1); its projection is a
perceptron, here it is linear.

Legend: b batch, c channels, h w pixels, e channels of the features, i j latent grid.
"""

import dataclasses

from jaxtyping import Float, Float32
from torch import Tensor

from taming_dist.exact import without_autocast
from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.terms.published import PublishedConfig
from taming_dist.losses.terms.term import DECODER, Networks, ProjectedTerm
from taming_dist.losses.terms.vf import directions
from taming_dist.ranges import ranged


class Semantic(ProjectedTerm):
    """The mean distance 1 - cosine between the decoder and the features at a position."""

    def __init__(self, network: FrozenNetwork) -> None:
        super().__init__()
        self.network, self.width = network, network.width

    def forward(
        self, images: Float[Tensor, "b c h w"], decoder: Float[Tensor, "b e i j"]
    ) -> Float32[Tensor, ""]:
        with without_autocast(images.device):
            i, j = decoder.shape[2:]
            features = directions(self.network.features(images, (i, j)))
            return 1 - (directions(decoder.float()) * features).sum(1).mean()


@dataclasses.dataclass
class SemanticConfig(PublishedConfig):
    """`size`: pixels across to which images are resized for the network."""

    looks_into = DECODER

    weight: float = ranged(0.5, at_least=0)  # the source's
    network: str = "vit_small_patch14_dinov2.lvd142m"
    size: int = ranged(224, at_least=16)

    def build(self, networks: Networks) -> Semantic:
        return Semantic(self.opened(networks, self.size))
