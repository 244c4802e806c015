"""Networks that were trained to recognise what images show, as losses look through them.

Legend: b batch, c channels, h w pixels, e channels of the features, i j their grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.exact import without_autocast
from taming_dist.resizing import resized


class FrozenNetwork(nn.Module):
    """A network of timm on images in [-1, 1], of 3 channels or of 1, which are resized to `size`
    pixels for it; frozen, in eval mode whatever its owner does.

    `network` comes from `taming_dist.pretrained.timm_network`; `width`: channels e of its features;
    `mean`, `deviation`: those of the images that it was trained on, for pixels in [0, 1].
    Everything is computed in fp32, also under autocast, and convolutions channels-last.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        network: Any,
        size: int,
        width: int,
        mean: Sequence[float],
        deviation: Sequence[float],
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.size, self.width = size, width
        for name, values in (("mean", mean), ("deviation", deviation)):
            values_ = torch.tensor(values, dtype=torch.float32).reshape(1, 3, 1, 1)
            self.register_buffer(name, values_, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in eval mode: dropout and stochastic depth have no place in a loss."""
        return super().train(False)

    @torch.no_grad()
    def features(
        self, images: Float[Tensor, "b c h w"], grid: tuple[int, int] | None = None
    ) -> Float32[Tensor, "b e i j"]:
        """The last feature map, behind the network's last norm, resized to a `grid` if that is
        given; no gradient reaches the images."""
        with without_autocast(images.device):
            found = last_features(self.network, self._prepared(images))
            return found if grid is None else resized(found, grid, "bilinear")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float32[Tensor, "b classes"]:
        """The logits of its classes."""
        with without_autocast(images.device):
            return self.network(self._prepared(images))

    def _prepared(self, images: Float[Tensor, "b c h w"]) -> Float32[Tensor, "b 3 side side"]:
        pixels = (resized(images.float(), (self.size, self.size), "bilinear") + 1) / 2
        whitened = (pixels - self.mean) / self.deviation
        return whitened.contiguous(memory_format=torch.channels_last)


def last_features(network: Any, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e i j"]:
    """The last feature map of a network of timm."""
    (found,) = network.forward_intermediates(
        images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return found
