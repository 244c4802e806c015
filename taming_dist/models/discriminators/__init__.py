"""Discriminators of the GAN loss, one file per family; all give logits [b,1,h,w]."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.models.discriminators.blurpool import BlurPoolConfig, BlurPoolGAN
from taming_dist.models.discriminators.config import DiscriminatorConfig
from taming_dist.models.discriminators.dino import DinoConfig, DinoHeads
from taming_dist.models.discriminators.norms import (
    BatchNorm,
    average_statistics,
    initialize_actnorm,
    sees_batches,
    track_statistics,
)
from taming_dist.models.discriminators.patchgan import PatchGAN, PatchGANConfig
from taming_dist.models.discriminators.stylegan import StyleGAN, StyleGANConfig

__all__ = [
    "DISCRIMINATORS",
    "BatchNorm",
    "BlurPoolConfig",
    "BlurPoolGAN",
    "DinoConfig",
    "DinoHeads",
    "DiscriminatorConfig",
    "PatchGAN",
    "PatchGANConfig",
    "StyleGAN",
    "StyleGANConfig",
    "accuracy",
    "average_statistics",
    "build_discriminator",
    "initialize_actnorm",
    "sees_batches",
    "track_statistics",
]

# name in conf/loss/discriminator -> its config and network
DISCRIMINATORS: dict[str, tuple[type[DiscriminatorConfig], Callable[..., nn.Module]]] = {
    "patchgan": (PatchGANConfig, PatchGAN),
    "stylegan": (StyleGANConfig, StyleGAN),
    "dino": (DinoConfig, DinoHeads),
    "blurpool": (BlurPoolConfig, BlurPoolGAN),
}


def build_discriminator(config: DiscriminatorConfig, image_channels: int) -> nn.Module:
    """The trained network of a discriminator's config."""
    networks = dict(DISCRIMINATORS.values())
    return networks[type(config)](config, image_channels)


def accuracy(real: Float[Tensor, "b 1 h w"], fake: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Share of logits on the right side of 0, for real and generated patches together."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
