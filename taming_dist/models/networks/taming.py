"""The paper's convolutional networks: `taming_dist.models.autoencoder`, by their sizes."""

import dataclasses

from torch import nn

from taming_dist.errors import UserError
from taming_dist.models.autoencoder import GROUPS, Decoder, Encoder
from taming_dist.models.first_stage import DecoderNetwork, FirstStageConfig
from taming_dist.ranges import ranged


@dataclasses.dataclass
class ConvolutionalConfig(FirstStageConfig):
    """Base for networks of residual blocks: `blocks` of them at each resolution, of `channels`
    times one of `multipliers`, and half the resolution at the next."""

    channels: int = ranged(128, at_least=1, compared=False)
    multipliers: list[int] = ranged([1, 1, 2, 2, 4], at_least=1, compared=False)
    blocks: int = ranged(2, at_least=1, compared=False)
    dropout: float = ranged(0.0, at_least=0, below=1, compared=False)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def coarse_width(self) -> int:
        return self.channels * self.multipliers[-1]

    def check(self) -> None:
        if self.channels % GROUPS:
            raise UserError(
                f"model.channels={self.channels}: use a multiple of {GROUPS} "
                f"(GroupNorm has {GROUPS} groups)"
            )


@dataclasses.dataclass
class VQGANConfig(ConvolutionalConfig):
    """The paper's architecture (arXiv 2012.09841, table 7). `resolution` places attention.
    `latent_channels` is the width of E before the 1x1 convolution to the quantizer's dimension, and
    of G after the one from it."""

    attention_resolutions: list[int] = ranged([16], at_least=1, empty=True, compared=False)
    latent_channels: int = ranged(256, at_least=1, compared=False)

    @property
    def name(self) -> str:
        """No key, so that configurations are as they were when there were no other networks."""
        return "vqgan"

    @property
    def encoder_width(self) -> int:
        return self.latent_channels

    @property
    def decoder_width(self) -> int:
        return self.latent_channels

    def encoder(self) -> nn.Module:
        return Encoder(
            self.modality.channels,
            self.latent_channels,
            self.channels,
            list(self.multipliers),
            self.blocks,
            list(self.attention_resolutions),
            self.resolution,
            self.dropout,
        )

    def decoder(self) -> DecoderNetwork:
        return Decoder(
            self.modality.channels,
            self.latent_channels,
            self.channels,
            list(self.multipliers),
            self.blocks,
            list(self.attention_resolutions),
            self.resolution,
            self.dropout,
        )
