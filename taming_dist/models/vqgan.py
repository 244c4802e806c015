"""The VQGAN: encoder, codebook and decoder. Source: arXiv 2012.09841, section 3.1.

"Images" are what the modality makes of a sample: colours, one-hot label maps or depth.

Legend: b batch, c channels, h w pixels, d latent channels, i j latent grid, f pixels per code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.autoencoder import AttnBlock, Decoder, Encoder, ResnetBlock
from taming_dist.models.export import Exported
from taming_dist.models.first_stage import FirstStageConfig, check_size
from taming_dist.models.networks import VQGANConfig, networks_of
from taming_dist.models.prior.blocks import Block
from taming_dist.models.quantizers import NO_CODE, Statistics, build_quantizer, keep_used
from taming_dist.models.quantizers.interface import STRAIGHT_THROUGH, StaysFloat32

LATENTS, DECODER = "latents", "decoder"  # what losses may look into, see `VQGAN.add_projections`

__all__ = [
    "DECODER",
    "LATENTS",
    "VQGAN",
    "FirstStageConfig",
    "Reconstruction",
    "VQGANConfig",
    "check_all_coded",
    "check_size",
    "with_codes",
]


class Reconstruction(NamedTuple):
    """What a training step needs; `images`, `codebook_loss` and `projected` carry gradients.

    images: G(z_q); features: the input of the decoder's last convolution, detached (it serves the
    adaptive weight alone); statistics: see `Statistics`; projected: by name, see
    `VQGAN.add_projections`.
    """

    images: Float[Tensor, "b c h w"]
    features: Float[Tensor, "b width h w"]
    codebook_loss: Float32[Tensor, ""]
    codes: Int64[Tensor, "b *shape"]
    statistics: Statistics
    projected: dict[str, Float[Tensor, "b _ i j"]]


class VQGAN(
    Exported,
    library_name="taming_dist",
    license="mit",
    tags=["vqgan"],
    paper_url="https://arxiv.org/abs/2012.09841",
):
    """x^ = G(q(E(x))), images in [-1, 1] (label maps: one-hot in, logits out)."""

    kind = "vqgan"
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder": ("encoder", "quant_conv"),
        "quantizer": ("quantize",),
        "decoder": ("post_quant_conv", "decoder"),
    }
    training_only = ("projections",)
    # a codebook that a run starts from is not begun from data again, and no code of it is dead yet
    steering = ("quantize.start.done", "quantize.usage.mean")
    block_types = (ResnetBlock, AttnBlock, Block)
    passes = ("latents", "decoded")  # the search for codes between them may wait for the device

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self.config, dim = config, config.quantizer.dim
        self.encoder = config.encoder()
        self.decoder = config.decoder()
        self.quantize = build_quantizer(config.quantizer)
        self.quant_conv = nn.Conv2d(config.encoder_width, dim, 1)
        width = config.decoder_width
        self.post_quant_conv = nn.Identity() if width is None else nn.Conv2d(dim, width, 1)
        self.projections = nn.ModuleDict()
        self._sources: dict[str, str] = {}  # of the projections

    @classmethod
    def _decode_arg(cls, expected_type: Any, value: Any) -> Any:
        return super()._decode_arg(networks_of(value), value)

    def add_projections(self, asked: Mapping[str, tuple[str, int]]) -> "VQGAN":
        """Have `forward` give linear maps for losses, by name: what of and to how many channels.

        `LATENTS`: before they are quantized; `DECODER`: the decoder's features at their resolution.
        The maps are trained and in checkpoints with all else, and left out of exports.
        """
        widths = {LATENTS: self.config.quantizer.dim, DECODER: self.config.coarse_width}
        for name, (source, width) in asked.items():
            self.projections[name] = nn.Conv2d(widths[source], width, 1)
            self._sources[name] = source
        return self

    def run_lean(self) -> bool:
        """Run by kernels of our own from now on, if there is Triton: the search for codes, and E
        and G if they are the paper's and the kernels take their widths
        (`taming_dist.models.lean`); gives whether it does.
        """
        if find_spec("triton") is None:
            return False
        for module in self.quantize.modules():
            if isinstance(module, StaysFloat32):
                module.lean = True
        if isinstance(self.encoder, Encoder) and isinstance(self.decoder, Decoder):
            widths = {
                block.norm1.num_channels
                for block in self.modules()
                if isinstance(block, ResnetBlock)
            }
            powers_of_two = all(width & (width - 1) == 0 for width in widths)
            self.encoder.lean = self.decoder.lean = powers_of_two
        return True

    def forward(self, images: Float[Tensor, "b c h w"]) -> Reconstruction:
        """Images in [-1,1] -> their reconstruction, with what training needs beside."""
        z = self.latents(images)
        quantized = self.quantize(z)
        decoded, features, coarse = self.decoded(quantized.z_q.to(images.dtype))
        inside = {LATENTS: z, DECODER: coarse}
        projected = {
            name: layer(inside[self._sources[name]]) for name, layer in self.projections.items()
        }
        return Reconstruction(
            images=decoded,
            features=features,
            codebook_loss=quantized.loss,
            codes=quantized.codes,
            statistics=quantized.statistics,
            projected=projected,
        )

    def decoded(
        self, z: Float[Tensor, "b d i j"]
    ) -> tuple[
        Float[Tensor, "b c h w"], Float[Tensor, "b width h w"], Float[Tensor, "b coarsest i j"]
    ]:
        """G(z), the input of its last convolution, and what its levels start from. The second is
        detached: attached, it would be a second output on the same path, and DeepSpeed would divide
        the gradient by the number of micro-batches twice."""
        coarse, features = self.decoder.stages(self.post_quant_conv(z))
        return self.decoder.conv_out(features), features.detach(), coarse

    def latents(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Vectors before quantisation; i = h/f, j = w/f."""
        check_size(images.shape[-2], self.config.factor, "image height")
        check_size(images.shape[-1], self.config.factor, "image width")
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b *shape"]:
        """Images in [-1,1] -> codes of the config's `code_shape`: those of `forward` in eval mode.

        The encoder and the search run, and nothing else: no loss, no statistics, no graph. Where
        latents are not finite the code is -1, see `check_all_coded`; the device is not waited for.
        """
        return self.quantize.encode(self.latents(images.to(self.dtype)))

    def decode_codes(self, codes: Int64[Tensor, "b *shape"]) -> Float[Tensor, "b c h w"]:
        """Codes -> images of the config's `image_shape`, about in [-1,1] (not clamped); logits."""
        return self.decoder(self.entries(codes))

    def entries(self, codes: Int64[Tensor, "b *shape"]) -> Float[Tensor, "b d i j"]:
        """Codes -> the vectors that the decoder reads."""
        return self.post_quant_conv(self.quantize.lookup(codes).to(self.dtype))

    def canonical_config(self) -> dict[str, Any]:
        """The configuration as config.json has it: a later key is left out where it is what there
        was before it, so that exports keep their fingerprints."""
        values = super().canonical_config()
        if values["quantizer"].get("gradient") == STRAIGHT_THROUGH:
            del values["quantizer"]["gradient"]
        return values

    @property
    def dtype(self) -> Any:
        return self.quant_conv.weight.dtype

    @property
    def tokenizer_fingerprint(self) -> str:
        """That of encoder and codebook, which decide the codes: the identity of a tokenizer. It
        stays when the decoder is trained on (`train.freeze=[encoder,quantizer]`)."""
        deciding = {*self.parts["encoder"], *self.parts["quantizer"]}
        state = self.state_dict().items()
        return self.fingerprint_of({name: t for name, t in state if name.split(".")[0] in deciding})

    def wrote(self, fingerprint: str) -> bool:
        """Whether codes are this tokenizer's: by the fingerprint of encoder and codebook, or as was
        written before there was one, by that of the whole model."""
        return fingerprint == self.tokenizer_fingerprint or fingerprint == self.fingerprint


def check_all_coded(codes: Int[Tensor, "b ..."], keys: Sequence[str], advice: str) -> None:
    """UserError naming an image if one of the codes of images `keys` is missing.

    Call it once the codes are on the CPU anyway.
    """
    missing = (codes == NO_CODE).flatten(1).any(1).tolist()
    if any(missing):
        key = keys[missing.index(True)]
        raise UserError(f"the encoder gives latents that are not finite for {key}: {advice}")


def with_codes(
    config: FirstStageConfig, state: Mapping[str, Tensor], used: Int64[Tensor, "U"]
) -> tuple[FirstStageConfig, dict[str, Tensor]]:
    """Configuration and state of a VQGAN that has the codes `used` only, in that order.

    Raises:
        UserError: as `keep_used`.
    """
    prefix = "quantize."
    codebook = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    quantizer, kept = keep_used(config.quantizer, codebook, used)
    changed = {prefix + name: tensor for name, tensor in kept.items()}
    return dataclasses.replace(config, quantizer=quantizer), dict(state) | changed
