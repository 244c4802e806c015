"""How different images look to a frozen network: LPIPS, arXiv 1801.03924."""

import dataclasses

from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.losses.perceptual import LPIPS, NETS, WEIGHTS
from taming_dist.losses.perceptual_half import HalfLPIPS
from taming_dist.losses.terms.term import Networks, TermConfig
from taming_dist.ranges import check_choice

SMALLEST = 16  # pixels across: VGG16 and AlexNet halve them four times


class Perceptual(nn.Module):
    """Mean LPIPS of the images of a batch."""

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.lpips = lpips
        self.in_half: HalfLPIPS | None = None

    def run_in_half(self) -> None:
        """Compute it in fp16 from now on, as `taming_dist.losses.perceptual_half` does."""
        self.in_half = HalfLPIPS(self.lpips)

    def forward(
        self, images: Float[Tensor, "b c h w"], reconstructions: Float[Tensor, "b c h w"]
    ) -> Float32[Tensor, ""]:
        if self.in_half is not None:
            return self.in_half(images, reconstructions).mean()
        return self.lpips(images, reconstructions, self.lpips.features(images)).mean()


@dataclasses.dataclass
class PerceptualConfig(TermConfig):
    """`net`: vgg or alex; `weights`: pretrained, or random (tests only)."""

    net: str = "vgg"
    weights: str = "pretrained"

    def check(self, key: str) -> None:
        super().check(key)
        check_choice(f"{key}.net", self.net, NETS)
        check_choice(f"{key}.weights", self.weights, WEIGHTS)

    def check_size(self, size: int) -> None:
        if size < SMALLEST:
            raise UserError(f"data.size={size}: LPIPS needs at least {SMALLEST} pixels")

    def build(self, networks: Networks) -> Perceptual:
        return Perceptual(networks.lpips_network(self.net, self.weights))
