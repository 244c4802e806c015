"""LPIPS: how different two images look, measured on the features of a frozen network.

Source: Zhang et al., arXiv 1801.03924, equation 1 (version 0.1 of its weights); the perceptual
part of the reconstruction loss in arXiv 2012.09841, section 3.1.

Legend: b batch, c channels, h w pixels.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.exact import without_autocast

NETS = ("vgg", "alex")  # the networks that there are heads for
WEIGHTS = ("pretrained", "random")

# Mean and deviation of the images the backbones were trained on, for pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class LPIPS(nn.Module):
    """Perceptual distance on given networks; frozen, in eval mode whatever its owner does.

    `slices` run one after the other, each ending in a ReLU whose output is one layer's features;
    `heads` holds one weight per channel for each of them. Both come from
    `taming_dist.pretrained.lpips_network`. Everything is computed in fp32, also under autocast, and
    channels-last.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, slices: Sequence[nn.Module], heads: Sequence[Float[Tensor, "_"]]) -> None:
        super().__init__()
        assert len(slices) == len(heads)
        self.slices = nn.ModuleList(slices)
        self.heads = nn.ParameterList(
            nn.Parameter(head.float().reshape(1, -1, 1, 1), requires_grad=False) for head in heads
        )
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        for layer in self.slices.modules():  # once, not at each call
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode: a training model that owns this one must not put noise in its loss."""
        return super().train(False)

    @torch.no_grad()
    def features(self, x: Float[Tensor, "b c h w"]) -> list[Float32[Tensor, "b _ _ _"]]:
        """Features of a reference in [-1, 1], for several calls of `forward`."""
        return self.layers(x)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        y: Float[Tensor, "b c h w"],
        x_features: list[Float32[Tensor, "b _ _ _"]] | None = None,
    ) -> Float32[Tensor, "b"]:
        """Distance of x and y, both in [-1, 1], of 3 channels or of 1, which is broadcast.

        `x_features`, from `features(x)`, saves the pass over x; no gradient reaches x then.
        """
        with without_autocast(y.device):
            ours = self.layers(x) if x_features is None else x_features
            return distances(ours, self.layers(y), self.heads)

    def layers(self, images: Float[Tensor, "b c h w"]) -> list[Float32[Tensor, "b _ _ _"]]:
        """Features of images in [-1, 1] in each layer, of length one in every pixel."""
        with without_autocast(images.device):
            hidden = (images.float() - self.shift) / self.scale
            hidden = hidden.contiguous(memory_format=torch.channels_last)
            features = []
            for part in self.slices:
                hidden = part(hidden)
                features.append(unit_length(hidden))
            return features


def distances(
    ours: Sequence[Float32[Tensor, "b _ _ _"]],
    theirs: Sequence[Float32[Tensor, "b _ _ _"]],
    heads: Iterable[Float32[Tensor, "1 _ 1 1"]],
) -> Float32[Tensor, "b"]:
    """The sum over layers of what two images' features of length one differ by."""
    layers = zip(ours, theirs, heads, strict=True)
    # in the layout of the features, and so is the gradient
    each = [torch.linalg.vecdot((a - b) * head, a - b, dim=1).mean((1, 2)) for a, b, head in layers]
    return torch.stack(each).sum(0)


def unit_length(features: Float32[Tensor, "b c h w"]) -> Float32[Tensor, "b c h w"]:
    """Scale each pixel's feature vector to length one; zero vectors stay zero, gradient zero.

    The plain formula has a NaN gradient at zero. Zero is the right one there: such features come
    from a ReLU that is off in every channel, which passes no gradient.
    """
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)  # its gradient at zero is zero
    return features * torch.where(length > 0, 1 / (length + _EPSILON), 0.0)
