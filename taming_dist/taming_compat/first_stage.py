"""First stages of the original (VQModel, VQSegmentationModel, GumbelVQ) and of latent diffusion.

Encoder, decoder and the two 1x1 convolutions have the same names here and there, only codebooks are
called otherwise. Nearly all of the architecture is in the shapes; the rest is in the YAML file.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.choice import chosen, configs
from taming_dist.models.export import assemble
from taming_dist.models.modalities import (
    RGB,
    Depth,
    Edges,
    LabelMap,
    LowResolution,
    Modality,
    palette,
)
from taming_dist.models.quantizers import VARIANTS
from taming_dist.models.vqgan import VQGAN, FirstStageConfig, VQGANConfig, with_codes
from taming_dist.taming_compat.description import check_said, instance, number, section
from taming_dist.training.export import check_tensors

# Beside the model itself; prefix -> what it is.
ASIDE = {
    "loss.perceptual_loss.": "the perceptual loss, which is kept apart",
    "loss.discriminator.": "the discriminator",
    "model_ema.": "moving averages of the weights; the weights themselves are taken",
    "colorize": "colours of label maps in previews",
    "quantize.codebook_used": "codes that were in use lately",
}
DISCRIMINATOR = "loss.discriminator."  # its names below this are those of our PatchGAN

# Quantizer -> our name of each of its tensors -> the original's; both below `quantize.`
CODEBOOKS: dict[str, dict[str, str]] = {
    "vector": {"embedding.weight": "embedding.weight"},
    "ema": {
        "entries": "embedding.weight",
        "cluster_size": "embedding.cluster_size",
        "cluster_sum": "embedding.embed_avg",
    },
    "gumbel": {
        "proj.weight": "proj.weight",
        "proj.bias": "proj.bias",
        "embed.weight": "embed.weight",
    },
}
# What the original's quantizers are, where this differs from our defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "vector": {"legacy": True},
    "ema": {"normalized": False, "revive_below": 0.0},
    "gumbel": {},
}
# The original's name of the column that a modality reads.
IMAGE_KEYS: dict[type[Modality], str] = {
    RGB: "image",
    LabelMap: "segmentation",
    Depth: "depth",
    Edges: "edge",
    LowResolution: "lr",
}
DEFAULT_RESOLUTION = 256  # of all models that the authors published


def set_aside(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of the model itself, and how many of each prefix in `ASIDE` there were."""
    kept, counts = dict(tensors), dict.fromkeys(ASIDE, 0)
    for name in tensors:
        for prefix in ASIDE:
            if name.startswith(prefix):
                del kept[name]
                counts[prefix] += 1
    return kept, {prefix: count for prefix, count in counts.items() if count}


def import_vqgan(
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    resolution: int | None = None,
    label_map: bool = False,
) -> VQGAN:
    """A VQGAN from the original's tensors, without those in `ASIDE`.

    `description`: the parameters in its YAML file, or nothing. `resolution` (pixels) places
    attention, if the description does not say it: 256 unless given. `label_map`: whether the
    checkpoint had colours for label maps, which only those stages have.

    Raises:
        UserError: tensors are missing or unknown, or do not fit each other or the description.
    """
    tensors = dict(tensors)
    used = tensors.pop("quantize.used", None)
    kind = codebook_kind(tensors)
    renamed = {f"quantize.{theirs}": f"quantize.{ours}" for ours, theirs in CODEBOOKS[kind].items()}
    state = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    config: FirstStageConfig = infer(state, kind, description, resolution, label_map)
    check_layout(config, state)
    if used is not None:
        config, state = with_codes(config, state, used)
    return assemble(VQGAN, config, state)


def check_layout(config: FirstStageConfig, state: Mapping[str, Tensor]) -> None:
    """UserError unless the tensors are, by our names, those of a VQGAN of this configuration."""
    with torch.device("meta"):
        expected = VQGAN(config).state_dict()
    check_tensors(expected, state, "the checkpoint")


def codebook_kind(tensors: Mapping[str, Tensor]) -> str:
    """Which quantizer the tensors below `quantize.` are of."""
    prefix = "quantize."
    found = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    for kind, names in CODEBOOKS.items():
        if found == set(names.values()):
            return kind
    there = ", ".join(f"{prefix}{name}" for name in sorted(found)[:4]) or f"no {prefix}*"
    raise UserError(
        f"no codebook is known that consists of {there} (expected quantize.embedding.weight, or "
        f"quantize.proj.* and quantize.embed.weight): give a VQModel, VQSegmentationModel or "
        f"GumbelVQ"
    )


def infer(
    state: Mapping[str, Tensor],
    kind: str,
    description: Mapping[str, Any],
    resolution: int | None,
    label_map: bool = False,
) -> VQGANConfig:
    """The architecture, from shapes and from what the description says beyond them."""
    channels, image_channels = shape_of(state, "encoder.conv_in.weight")[:2]
    dim, latent_channels = shape_of(state, "quant_conv.weight")[:2]
    codes = shape_of(state, f"quantize.{next(iter(CODEBOOKS[kind]))}")[0]
    widths = [
        shape_of(state, f"encoder.down.{level}.block.0.conv2.weight")[0]
        for level in range(children(state, "encoder.down."))
    ]
    blocks = children(state, "encoder.down.0.block.")
    attended = [
        level for level in range(len(widths)) if f"encoder.down.{level}.attn.0.q.weight" in state
    ]
    said = section(description, "ddconfig")
    resolution = resolution or int(number(said, "resolution", DEFAULT_RESOLUTION))
    quantizer = {"name": kind, "codes": codes, "dim": dim} | SETTINGS[kind]
    if kind == "gumbel" and "kl_weight" in description:
        quantizer["kl_weight"] = number(description, "kl_weight", 0.0)
    levels = [resolution >> level for level in range(len(widths))]
    config = VQGANConfig(
        quantizer=chosen(configs(VARIANTS), quantizer, "model/quantizer"),
        resolution=resolution,
        modality=modality_of(
            image_channels, label_map or "n_labels" in description, description.get("image_key")
        ),
        channels=channels,
        multipliers=[width // channels for width in widths],
        blocks=blocks,
        attention_resolutions=[levels[level] for level in attended],
        latent_channels=latent_channels,
        dropout=float(number(said, "dropout", 0.0)),
    )
    shapes = {name: value for name, value in describe(config).items() if name != "ddconfig"}
    check_said(shapes, description)
    asked = said.get("attn_resolutions", config.attention_resolutions)
    said = said | {"attn_resolutions": [size for size in levels if size in asked]}
    check_said(ddconfig(config), said)
    return config


def modality_of(channels: int, label_map: bool, image_key: Any = None) -> Modality:
    """What a first stage of the original encodes: only label maps have other than 1 or 3 channels,
    and their checkpoints and YAML files say so. `image_key` of the YAML tells the others apart."""
    if label_map or channels not in (1, 3):
        return LabelMap(channels)
    if channels == 3:
        return LowResolution() if image_key == IMAGE_KEYS[LowResolution] else RGB()
    return Edges() if image_key == IMAGE_KEYS[Edges] else Depth()


def with_key(vqgan: VQGAN, image_key: Any) -> VQGAN:
    """The same VQGAN, for the column of a batch that the original calls `image_key`."""
    config = vqgan.config
    label_map = isinstance(config.modality, LabelMap)
    modality = modality_of(config.modality.channels, label_map, image_key)
    return assemble(VQGAN, replace(config, modality=modality), vqgan.state_dict())


def ddconfig(config: VQGANConfig) -> dict[str, Any]:
    """Encoder and decoder as the original's YAML describes them."""
    return {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.resolution,
        "in_channels": config.modality.channels,
        "out_ch": config.modality.channels,
        "ch": config.channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    }


def describe(config: VQGANConfig) -> dict[str, Any]:
    """What the original's YAML says of every first stage."""
    return {
        "embed_dim": config.quantizer.dim,
        "n_embed": config.quantizer.codes,
        "ddconfig": ddconfig(config),
    }


def export_vqgan(vqgan: VQGAN) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the original's names, and {"target": class, "params": ...} for its YAML.

    The tensors are those of an inference checkpoint, without `loss.*`: the description's loss is
    the original's DummyLoss.

    Raises:
        UserError: the original has no such networks, or no such quantizer.
    """
    config, quantizer = vqgan.config, vqgan.config.quantizer
    if not isinstance(config, VQGANConfig):
        raise UserError(
            f"model={config.name}: the original has no such networks; only those of model=f16 can "
            f"leave for it"
        )
    if quantizer.name not in CODEBOOKS:
        raise UserError(
            f"model.quantizer.name={quantizer.name}: the original has no such quantizer; only "
            f"{', '.join(CODEBOOKS)} can leave for it"
        )
    state = vqgan.state_dict()
    tensors = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    if quantizer.name == "gumbel":
        for ours, theirs in CODEBOOKS["gumbel"].items():
            tensors[f"quantize.{theirs}"] = state[f"quantize.{ours}"]
    else:
        tensors["quantize.embedding.weight"] = _entries(quantizer, state)
    params = describe(config) | {"lossconfig": {"target": "taming.modules.losses.DummyLoss"}}
    if quantizer.name == "gumbel":
        params |= {"kl_weight": quantizer.kl_weight, "temperature_scheduler_config": SCHEDULE}
        return tensors, instance("taming.models.vqgan.GumbelVQ", params)
    # without the last one the original fails on the codes of a condition
    params |= {"image_key": IMAGE_KEYS[type(config.modality)], "sane_index_shape": True}
    if not isinstance(config.modality, LabelMap):
        return tensors, instance("taming.models.vqgan.VQModel", params)
    classes = config.modality.classes
    tensors["colorize"] = palette(classes).T.reshape(3, classes, 1, 1).contiguous()
    return tensors, instance(
        "taming.models.vqgan.VQSegmentationModel", {"n_labels": classes} | params
    )


def _entries(quantizer: Any, state: Mapping[str, Tensor]) -> Tensor:
    """A codebook as a plain one with the same codes: the original's class for averages never
    worked, and among entries of unit length the nearest is the same at any length of the vector."""
    entries = state[f"quantize.{next(iter(CODEBOOKS[quantizer.name]))}"]
    return F.normalize(entries, dim=-1) if quantizer.normalized else entries


# The published f8 model's; the constructor of the original wants one.
SCHEDULE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "warm_up_steps": 0,
        "max_decay_steps": 1_000_001,
        "lr_start": 0.9,
        "lr_max": 0.9,
        "lr_min": 1e-6,
        "verbosity_interval": 0,
    },
}


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """The sizes of a weight of two axes or more; UserError if it is missing."""
    if name not in tensors or tensors[name].ndim < 2:
        raise UserError(f"{name} is missing: this is no VQGAN in a layout that is known")
    return tensors[name].shape


def children(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many children, numbered from 0, are below `prefix`."""
    numbers = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
