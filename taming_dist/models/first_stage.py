"""What the networks of a VQGAN have in common, whatever they are made of.

Legend: b batch, c channels, h w pixels, d latent channels, i j latent grid, f pixels per code.
"""

import dataclasses
from collections.abc import Sequence

from jaxtyping import Float
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.choice import chosen, configs
from taming_dist.models.export import ModelConfig
from taming_dist.models.modalities import MODALITIES, Modality
from taming_dist.models.quantizers import VARIANTS, QuantizerConfig
from taming_dist.ranges import check_ranges, ranged


class DecoderNetwork(nn.Module):
    """G: latents [b,d,i,j] -> images [b,c,h,w], h = i*f and w = j*f.

    `features` ends before the last convolution `conv_out` (3x3, padding 1), whose weight gradients
    set the adaptive weight of the GAN loss (equation 7 of arXiv 2012.09841); `forward` is
    `conv_out(features(z))`.
    """

    conv_out: nn.Conv2d

    def stages(
        self, z: Float[Tensor, "b d i j"]
    ) -> tuple[Float[Tensor, "b coarse i j"], Float[Tensor, "b width h w"]]:
        """What it makes of latents at their resolution, `coarse_width` channels, and `features`,
        which comes of it."""
        raise NotImplementedError

    def features(self, z: Float[Tensor, "b d i j"]) -> Float[Tensor, "b width h w"]:
        return self.stages(z)[1]

    def forward(self, z: Float[Tensor, "b d i j"]) -> Float[Tensor, "b c h w"]:
        return self.conv_out(self.features(z))


@dataclasses.dataclass
class FirstStageConfig(ModelConfig):
    """Base of the config classes of a VQGAN: each makes networks of another kind.

    `resolution`: pixels of the training images; others of whole codes work too. `modality`: what is
    encoded, of `taming_dist.models.modalities`.
    """

    quantizer: QuantizerConfig = MISSING
    resolution: int = ranged(256, at_least=1, compared=False)
    modality: Modality = dataclasses.field(default=MISSING, kw_only=True)

    @property
    def name(self) -> str:
        """Its own, by which config.json tells the kinds apart."""
        raise NotImplementedError

    @property
    def factor(self) -> int:
        """Pixels per code along one side."""
        raise NotImplementedError

    @property
    def encoder_width(self) -> int:
        """Channels that the encoder gives, before the 1x1 convolution to the quantizer's."""
        raise NotImplementedError

    @property
    def decoder_width(self) -> int | None:
        """Channels that the decoder reads, after a 1x1 convolution; None: it reads the entries of
        the codebook as they are."""
        raise NotImplementedError

    @property
    def coarse_width(self) -> int:
        """Channels of the decoder at the resolution of the latents."""
        raise NotImplementedError

    def encoder(self) -> nn.Module:
        """E: images [b,c,h,w] -> [b,encoder_width,h/f,w/f]."""
        raise NotImplementedError

    def decoder(self) -> DecoderNetwork:
        """G, of what the decoder reads."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return self.quantizer.codes

    def code_shape(self, height: int, width: int, name: str = "image size") -> tuple[int, ...]:
        """The shape of the codes of an image of so many pixels: a grid (i, j) with i = h/f and
        j = w/f, several of them (levels, i, j), or a sequence (n,).

        Raises:
            UserError: there are none for images of that size; `name` is the size's.
        """
        for side in (height, width):
            check_size(side, self.factor, name)
        try:
            return self.quantizer.code_shape(height // self.factor, width // self.factor)
        except UserError as error:
            raise UserError(f"{name}={height}: {error}") from error

    def image_shape(self, code_shape: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of the images whose codes have a shape."""
        i, j = self.quantizer.latent_grid(code_shape)
        return i * self.factor, j * self.factor

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        own = type(self).name
        if isinstance(own, str) and self.name != own:
            raise UserError(f"model.name={self.name}: it is {own} here, choose networks by model=")
        self.quantizer = chosen(configs(VARIANTS), self.quantizer, "model/quantizer")
        self.modality = chosen(MODALITIES, self.modality, "model/modality")
        self.check()
        self.code_shape(self.resolution, self.resolution, "model.resolution")

    def check(self) -> None:
        """UserError for sizes that do not go together."""


def check_size(size: int, factor: int, name: str) -> None:
    """UserError unless an image side of `size` pixels is one of whole codes."""
    if size < factor or size % factor:
        raise UserError(
            f"{name}={size}: a code of this model stands for {factor} x {factor} pixels, "
            f"so use a multiple of {factor}"
        )
