"""LPIPS with convolutions in fp16, for training on GPUs: half the bytes and tensor cores.

fp16 rather than bf16: VGG's features need its 11 bits, without which the gradient of a blurred
image points elsewhere. Its range suffices where gradients are scaled: those of a mean over all
pixels of a batch are too small for it. Everything behind the convolutions is in fp32.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.exact import without_autocast
from taming_dist.losses.perceptual import LPIPS, distances, unit_length

PIXELS_PER_SCALE = 16  # 2^16 for 16 images of 256 x 256, with which it was found to be right


class _Cast(torch.autograd.Function):
    """Another dtype. Gradients come back in the former one, times a factor, multiplied in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "..."], dtype: torch.dtype, factor: float
    ) -> Float[Tensor, "..."]:
        ctx.dtype, ctx.factor = x.dtype, factor
        return x.to(dtype)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], None, None]:
        return (gradients[0].float() * ctx.factor).to(ctx.dtype), None, None


class HalfLPIPS(nn.Module):
    """The distance that an `LPIPS` gives, by a copy of its convolutions in fp16; frozen."""

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.slices = copy.deepcopy(lpips.slices).half()
        self.heads, self.shift, self.scale = lpips.heads, lpips.shift, lpips.scale

    def forward(
        self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]
    ) -> Float32[Tensor, "b"]:
        """Distance of x and y, both in [-1, 1], of 3 channels or of 1; no gradient reaches x."""
        with without_autocast(y.device):
            with torch.no_grad():
                ours = self.layers(x)
            return distances(ours, self.layers(y), self.heads)

    def layers(self, images: Float[Tensor, "b c h w"]) -> list[Float32[Tensor, "b _ _ _"]]:
        """`LPIPS.layers`."""
        b, _, h, w = images.shape
        scale = b * h * w / PIXELS_PER_SCALE
        whitened = (images.float() - self.shift) / self.scale
        whitened = whitened.contiguous(memory_format=torch.channels_last)
        hidden = _Cast.apply(whitened, torch.float16, 1 / scale)
        features = []
        for part in self.slices:
            hidden = part(hidden)
            features.append(unit_length(_Cast.apply(hidden, torch.float32, scale)))
        return features
