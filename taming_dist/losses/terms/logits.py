"""How differently a classifier judges an image and its reconstruction.

Source: the perceptual loss of MaskGIT (arXiv 2202.04200), as TiTok (arXiv 2406.07550) has it, on
the logits of a ConvNeXt-S.
"""

import dataclasses

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.terms.published import PublishedConfig
from taming_dist.losses.terms.term import Networks
from taming_dist.ranges import ranged

SIZE = 224  # pixels across, what such classifiers are trained on


class Logits(nn.Module):
    """Mean squared difference of the logits."""

    def __init__(self, network: FrozenNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, images: Float[Tensor, "b c h w"], reconstructions: Float[Tensor, "b c h w"]
    ) -> Float32[Tensor, ""]:
        with torch.no_grad():
            real = self.network(images)
        return (self.network(reconstructions) - real).square().mean()


@dataclasses.dataclass
class LogitsConfig(PublishedConfig):
    """A classifier of ImageNet."""

    weight: float = ranged(0.1, at_least=0)  # TiTok's, beside LPIPS of weight 1
    network: str = "convnext_small.fb_in1k"

    def build(self, networks: Networks) -> Logits:
        network = self.opened(networks, SIZE)
        if not network.network.num_classes:
            raise UserError(
                f"{self.network} has no classifier, whose logits are compared: use a network such "
                f"as {LogitsConfig.network}"
            )
        return Logits(network)
