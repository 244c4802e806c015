"""PatchGAN. Source: arXiv 1611.07004, as used in 2012.09841.

Parameter names are those of the original implementation's `loss.discriminator.*`.
"""

import dataclasses

from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.convolution import laid_out
from taming_dist.models.discriminators.config import DiscriminatorConfig
from taming_dist.models.discriminators.norms import NORMS
from taming_dist.models.initial import draw_normal
from taming_dist.ranges import check_ranges, ranged

MOST_LAYERS = 16  # for images of 2^18 pixels across


@dataclasses.dataclass
class PatchGANConfig(DiscriminatorConfig):
    """`channels` of the first layer, doubled up to 8 times of it over `layers` strided layers;
    `norm`: batch (as the original), actnorm, group or none."""

    channels: int = ranged(64, at_least=1)
    layers: int = ranged(3, at_least=1, at_most=MOST_LAYERS)
    norm: str = "batch"

    def __post_init__(self) -> None:
        check_ranges(self, "loss.discriminator")
        if self.norm not in NORMS:
            raise UserError(f"loss.discriminator.norm={self.norm}: use one of {sorted(NORMS)}")

    def smallest_size(self) -> int:
        """The smallest image side that leaves at least one logit."""
        size = 1 + 1 + 1  # two last layers of kernel 4, stride 1, padding 1 take one pixel each
        for _ in range(self.layers):
            size = 2 * size
        return size

    def check_size(self, size: int) -> None:
        """UserError for an image side that leaves no logit."""
        if size < self.smallest_size():
            raise UserError(
                f"data.size={size}: a discriminator of {self.layers} layers needs "
                f"{self.smallest_size()} pixels; set loss.discriminator.layers lower"
            )


class PatchGAN(nn.Module):
    """One logit for every overlapping patch of the images."""

    def __init__(self, config: PatchGANConfig, image_channels: int) -> None:
        super().__init__()
        norm, width = NORMS[config.norm], config.channels
        biased = config.norm in ("actnorm", "none")  # other norms have a shift of their own
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index in range(1, config.layers + 1):
            out = config.channels * min(2**index, 8)
            stride = 2 if index < config.layers else 1
            layers.append(nn.Conv2d(width, out, 4, stride, 1, bias=biased))
            layers += [norm(out), nn.LeakyReLU(0.2)]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 _ _"]:
        return self.main(laid_out(images))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        draw_normal(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        draw_normal(module.weight, 1.0, 0.02)
