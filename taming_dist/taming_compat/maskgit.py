"""MaskGIT's tokenizer (arXiv 2202.04200) as open-muse, TiTok and RAR publish it for PyTorch
(maskgit-vqgan-imagenet-f16-256.bin)."""

import re
from collections.abc import Mapping

from torch import Tensor

from taming_dist.models.export import assemble
from taming_dist.models.networks import MaskGITConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.first_stage import (
    DEFAULT_RESOLUTION,
    check_layout,
    children,
    modality_of,
    shape_of,
)

MARK = "encoder.mid.0.conv1."  # how names start that only this layout has

# Ours of names that differ: the encoder's last convolution, of 1x1, is the one to the quantizer's
# dimension, which every VQGAN has here.
RENAMED = (
    (re.compile(r"^encoder\.conv_out\."), "quant_conv."),
    (re.compile(r"\.upsample_conv\."), ".upsample.conv."),
)


def import_maskgit(tensors: Mapping[str, Tensor], resolution: int | None = None) -> VQGAN:
    """A VQGAN from the tensors of MaskGIT's VQGAN, for pictures in [-1,1] where theirs are in
    [0,1]; `resolution` (pixels): that of its training, 256 unless given.

    Raises:
        UserError: tensors are missing or unknown, or do not fit each other.
    """
    state = {our_name(name): tensor for name, tensor in tensors.items()}
    channels, image_channels = shape_of(state, "encoder.conv_in.weight")[:2]
    codes, dim = shape_of(state, "quantize.embedding.weight")
    widths = [
        shape_of(state, f"encoder.down.{level}.block.0.conv2.weight")[0]
        for level in range(children(state, "encoder.down."))
    ]
    config = MaskGITConfig(
        VectorQuantizerConfig(codes=codes, dim=dim),
        resolution or DEFAULT_RESOLUTION,
        modality=modality_of(image_channels, False),
        channels=channels,
        multipliers=[width // channels for width in widths],
        blocks=children(state, "encoder.down.0.block."),
    )
    check_layout(config, state)
    last = "decoder.conv_out"
    state[f"{last}.weight"] = 2 * state[f"{last}.weight"]
    state[f"{last}.bias"] = 2 * state[f"{last}.bias"] - 1
    return assemble(VQGAN, config, state)


def our_name(name: str) -> str:
    """What a tensor is called here."""
    for pattern, ours in RENAMED:
        name = pattern.sub(ours, name)
    return name
