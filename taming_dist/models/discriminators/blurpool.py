"""A discriminator of patches that blurs before it halves: what comes with MaskGIT's tokenizer in
TiTok's training.

Source: the discriminator of TiTok's code (arXiv 2406.07550); blurred downsampling: arXiv
1904.11486.
"""

import dataclasses

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.constants import constant
from taming_dist.models.convolution import laid_out
from taming_dist.models.discriminators.config import DiscriminatorConfig
from taming_dist.models.discriminators.norms import NORMS
from taming_dist.ranges import check_ranges, ranged

SLOPE = 0.1
GRID = 16  # logits across that are left of a larger map, the most telling ones
TAPS = (0.125, 0.375, 0.375, 0.125)


@dataclasses.dataclass
class BlurPoolConfig(DiscriminatorConfig):
    """`channels` of the first layer, doubled over `layers` halvings from the second on."""

    channels: int = ranged(128, at_least=1)
    layers: int = ranged(3, at_least=1, at_most=16)

    def __post_init__(self) -> None:
        check_ranges(self, "loss.discriminator")

    def check_size(self, size: int) -> None:
        """UserError for an image side that cannot be halved so often."""
        if size % 2**self.layers:
            raise UserError(
                f"data.size={size}: a discriminator of loss.discriminator.layers={self.layers} "
                f"halves the image so often, use a multiple of {2**self.layers}"
            )


class BlurPool(nn.Module):
    """Half the resolution by the low-pass filter [1, 3, 3, 1] / 8 along both sides."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h//2 w//2"]:
        taps = constant(TAPS, x.dtype, x.device)
        kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class BlurPoolGAN(nn.Module):
    """Logits for overlapping patches, at most about 16 x 16 of them."""

    def __init__(self, config: BlurPoolConfig, image_channels: int) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [
            nn.Conv2d(image_channels, width, 5, padding=2),
            nn.LeakyReLU(SLOPE),
        ]
        for index in range(config.layers):
            out = config.channels * 2**index
            layers += [nn.Conv2d(width, out, 3, padding=1), BlurPool()]
            layers += [NORMS["group"](out), nn.LeakyReLU(SLOPE)]
            width = out
        self.main = nn.Sequential(*layers)
        self.to_logits = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.LeakyReLU(SLOPE), nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 _ _"]:
        h = self.main(laid_out(images))
        rows, columns = (max(1, side // GRID) for side in h.shape[-2:])
        return self.to_logits(F.max_pool2d(h, (rows, columns)))
