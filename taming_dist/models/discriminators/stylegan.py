"""The residual discriminator of StyleGAN2: one logit for a whole image. Source: arXiv 1912.04958.

Architecture: section 4.1 and figure 7c; blurred downsampling: arXiv 1904.11486; equalised learning
rate and minibatch deviation: arXiv 1710.10196, sections 4.1 and 3.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.exact import without_autocast
from taming_dist.models.constants import constant
from taming_dist.models.discriminators.config import DiscriminatorConfig
from taming_dist.models.discriminators.norms import Averaged
from taming_dist.ranges import check_ranges, ranged

SLOPE = 0.2
GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU
SMALLEST = 4  # pixels of the last feature map


@dataclasses.dataclass
class StyleGANConfig(DiscriminatorConfig):
    """For images of `size` pixels, a power of two. `channels` of the first layer, doubled at every
    halving up to `max_channels`; `equalized`: weights of deviation 1, scaled when they are used."""

    size: int = ranged(256, at_least=2 * SMALLEST)
    channels: int = ranged(64, at_least=1)
    max_channels: int = ranged(512, at_least=1)
    equalized: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "loss.discriminator")
        if self.size & (self.size - 1):
            raise UserError(
                f"loss.discriminator.size={self.size}: a StyleGAN discriminator halves the image "
                f"down to {SMALLEST} pixels, so use a power of two from {2 * SMALLEST} on"
            )

    def check_size(self, size: int) -> None:
        """UserError for another image side than the network's."""
        if size != self.size:
            raise UserError(f"data.size={size}: set loss.discriminator.size={size} too")


class Weighted(nn.Module):
    """Weight and bias of a layer; equalised: N(0, 1), scaled by 1 / sqrt(fan in) in use."""

    def __init__(self, shape: tuple[int, ...], equalized: bool, biased: bool = True) -> None:
        super().__init__()
        deviation = 1 / math.sqrt(math.prod(shape[1:]))
        self.scale = deviation if equalized else 1.0
        self.weight = nn.Parameter(torch.randn(shape) * (1.0 if equalized else deviation))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if biased else None


class Conv(Weighted):
    """Convolution of odd kernel, same size; `down` blurs and halves."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        equalized: bool,
        down: bool = False,
        biased: bool = True,
    ) -> None:
        super().__init__((outputs, inputs, kernel, kernel), equalized, biased)
        self.down, self.padding = down, kernel // 2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out _ _"]:
        stride = 2 if self.down else 1
        if self.down and self.padding == 0:  # 1x1: it would read every second pixel only
            x, stride = blur(x, stride), 1
        elif self.down:
            x = blur(x)
        return F.conv2d(x, self.weight * self.scale, self.bias, stride, self.padding)


class Linear(Weighted):
    """Fully connected layer."""

    def __init__(self, inputs: int, outputs: int, equalized: bool) -> None:
        super().__init__((outputs, inputs), equalized)

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b out"]:
        return F.linear(x, self.weight * self.scale, self.bias)


def blur(x: Float[Tensor, "b c h w"], stride: int = 1) -> Float[Tensor, "b c _ _"]:
    """Low-pass filter [1, 2, 1] / 4 along both sides, size and mean kept: what is halved after it
    does not alias. `stride`: only every so many pixels of it."""
    taps = constant((0.25, 0.5, 0.25), x.dtype, x.device)
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, stride=stride, groups=x.shape[1])


def activate(x: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    return F.leaky_relu(x, SLOPE) * GAIN


class Block(nn.Module):
    """Two convolutions and a skip, which halve the image together."""

    def __init__(self, inputs: int, outputs: int, equalized: bool) -> None:
        super().__init__()
        self.conv1 = Conv(inputs, inputs, 3, equalized)
        self.conv2 = Conv(inputs, outputs, 3, equalized, down=True)
        self.skip = Conv(inputs, outputs, 1, equalized, down=True, biased=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h//2 w//2"]:
        return (activate(self.conv2(activate(self.conv1(x)))) + self.skip(x)) / math.sqrt(2)


class MinibatchDeviation(Averaged):
    """Appends one channel with the mean deviation over the batch, of all ranks together.

    Over the whole batch, as arXiv 1710.10196 has it: groups within a rank would make the loss
    depend on the number of ranks.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c+1 h w"]:
        with without_autocast(x.device):
            x32 = x.float()
            mean = self.over_ranks(x32.mean(0))
            variance = self.over_ranks((x32 - mean).square().mean(0))
            deviation = (variance + 1e-8).sqrt().mean()
        b, _, h, w = x.shape
        return torch.cat([x, deviation.to(x.dtype).expand(b, 1, h, w)], 1)


class StyleGAN(nn.Module):
    """One logit for an image of `size` pixels."""

    def __init__(self, config: StyleGANConfig, image_channels: int) -> None:
        super().__init__()
        self.size, equalized = config.size, config.equalized
        halvings = int(math.log2(config.size // SMALLEST))
        widths = [min(config.max_channels, config.channels * 2**n) for n in range(halvings + 1)]
        self.from_image = Conv(image_channels, widths[0], 1, equalized)
        self.blocks = nn.ModuleList(
            Block(widths[n], widths[n + 1], equalized) for n in range(halvings)
        )
        width = widths[-1]
        self.deviation = MinibatchDeviation()
        self.last = Conv(width + 1, width, 3, equalized)
        self.hidden = Linear(width * SMALLEST**2, width, equalized)
        self.out = Linear(width, 1, equalized)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 1 1"]:
        x = activate(self.from_image(images))
        for block in self.blocks:
            x = block(x)
        x = activate(self.last(self.deviation(x))).flatten(1)
        return self.out(activate(self.hidden(x)))[:, :, None, None]
