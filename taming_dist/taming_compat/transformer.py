"""The original's second stage (Net2NetTransformer): its transformer, with the VQGAN inside it.

The transformer's tensors have the same names here and there, below `transformer.`; the first stage
is below `first_stage_model.`. Heads and condition are not in the tensors, only in the YAML file.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.export import assemble
from taming_dist.models.prior.blocks import GPTBlockConfig
from taming_dist.models.prior.conditions import ClassCondition, Unconditional
from taming_dist.models.prior.orders import Raster
from taming_dist.models.prior.schemes import NextIndex
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.first_stage import check_said, export_vqgan, number, section
from taming_dist.training.export import check_tensors

TRANSFORMER, FIRST_STAGE, CONDITION = "transformer.", "first_stage_model.", "cond_stage_model."
ORIGINAL_HEADS = 8  # where its YAML says nothing


class Given(NamedTuple):
    """What the user says in place of a YAML file: heads, and classes (0: unconditional)."""

    heads: int | None = None
    classes: int | None = None


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def import_transformer(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], vqgan: VQGAN, given: Given
) -> Transformer:
    """A transformer from all tensors of a Net2NetTransformer, on the codes of `vqgan`.

    `description`: the parameters in its YAML file, or nothing.

    Raises:
        UserError: tensors are missing or unknown, the condition or the order of codes is one that
            the transformer does not know, or heads or condition are not said anywhere.
    """
    parts = (TRANSFORMER, FIRST_STAGE, "permuter.")
    unknown = sorted(name for name in tensors if not name.startswith(parts))
    if unknown:
        raise UserError(
            f"the checkpoint has {unknown[0]}{' and more' * (len(unknown) > 1)}: the transformer "
            f"knows no such condition; its first stage can be had with --only first_stage"
            + (", and its condition's with --only cond_stage" * unknown[0].startswith(CONDITION))
        )
    _check_order(below(tensors, "permuter."))
    state = below(tensors, TRANSFORMER)
    _take_masks(state)
    config = infer(state, description, vqgan, given)
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    check_tensors(expected, state, "the checkpoint's transformer")
    return assemble(Transformer, config, state)


def infer(
    state: Mapping[str, Tensor], description: Mapping[str, Any], vqgan: VQGAN, given: Given
) -> TransformerConfig:
    """The architecture, from shapes, the description and what the user says."""
    for name in ("tok_emb.weight", "pos_emb"):
        if name not in state:
            raise UserError(f"{TRANSFORMER}{name} is missing: this is no Net2NetTransformer")
    said = section(section(description, "transformer_config"), "params")
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    side = vqgan.config.resolution // vqgan.config.factor
    classes = _classes(description, given)
    config = TransformerConfig(
        vocabulary=state["tok_emb.weight"].shape[0],
        grid=[side, side],
        block_size=state["pos_emb"].shape[1],
        layers=len(layers),
        heads=_heads(said, given),
        width=state["tok_emb.weight"].shape[1],
        dropout_embedding=number(said, "embd_pdrop", 0.0),
        dropout_attention=number(said, "attn_pdrop", 0.0),
        dropout_residual=number(said, "resid_pdrop", 0.0),
        condition=ClassCondition(classes) if classes else Unconditional(),
        vqgan_fingerprint=vqgan.fingerprint,
        condition_table="shared",
    )
    check_said(describe(config), said)
    if config.vocabulary < vqgan.config.vocabulary:
        raise UserError(
            f"transformer.tok_emb.weight has {config.vocabulary} rows for the "
            f"{vqgan.config.vocabulary} codes of its first stage: they do not belong together"
        )
    if config.block_size < side * side:
        raise UserError(
            f"transformer.pos_emb has {config.block_size} positions for {side} x {side} codes of "
            f"an image of {vqgan.config.resolution} pixels: give the model's --resolution"
        )
    return config


def describe(config: TransformerConfig) -> dict[str, Any]:
    """The sizes as the original's YAML has them."""
    return {
        "vocab_size": config.vocabulary,
        "block_size": config.positions,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "embd_pdrop": config.dropout_embedding,
        "resid_pdrop": config.dropout_residual,
        "attn_pdrop": config.dropout_attention,
    }


def export_transformer(
    transformer: Transformer, vqgan: VQGAN
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a Net2NetTransformer, and {"target": class, "params": ...} for its YAML.

    Raises:
        UserError: `vqgan` is not the one whose codes the transformer learned, or the original has
            no place for its condition.
    """
    config = transformer.config
    _check_parts(config)
    if config.vqgan_fingerprint not in ("", vqgan.fingerprint):
        raise UserError(
            f"the VQGAN has the fingerprint {vqgan.fingerprint}, but the transformer learned the "
            f"codes of {config.vqgan_fingerprint}: name that VQGAN"
        )
    if config.condition_table == "own":
        raise UserError(
            "this transformer has a table for its condition alone (model.condition_table=own), and "
            "the original's format has one for classes and codes together: give its export itself, "
            "or train with model.condition_table=shared"
        )
    stage, first_stage = export_vqgan(vqgan)
    tensors = {f"{FIRST_STAGE}{name}": value for name, value in stage.items()}
    tensors |= {f"{TRANSFORMER}{name}": value for name, value in transformer.state_dict().items()}
    for layer in range(config.layers):
        tensors[f"{TRANSFORMER}blocks.{layer}.attn.mask"] = _causal(config.positions)
    gpt = {"target": "taming.modules.transformer.mingpt.GPT", "params": describe(config)}
    params: dict[str, Any] = {"transformer_config": gpt, "first_stage_config": first_stage}
    if isinstance(config.condition, ClassCondition):
        labels = {"n_classes": config.condition.classes}
        params["cond_stage_key"] = "class_label"
        params["cond_stage_config"] = {
            "target": "taming.modules.util.Labelator",
            "params": labels,
        }
    else:
        params |= {"unconditional": True, "cond_stage_config": "__is_unconditional__"}
    target = "taming.models.cond_transformer.Net2NetTransformer"
    return tensors, {"target": target, "params": params}


def _check_parts(config: TransformerConfig) -> None:
    """UserError for a condition, block, order or scheme for which the original has no place."""
    known: dict[str, tuple[type, ...]] = {
        "condition": (Unconditional, ClassCondition),
        "block": (GPTBlockConfig,),
        "order": (Raster,),
        "scheme": (NextIndex,),
    }
    for part, kinds in known.items():
        found = getattr(config, part)
        if not isinstance(found, kinds):
            raise UserError(
                f"a transformer with model/{part}={found.name} cannot be written in the original's "
                f"format: give its export itself"
            )


def _heads(said: Mapping[str, Any], given: Given) -> int:
    if said:
        heads = int(number(said, "n_head", ORIGINAL_HEADS))
        if given.heads not in (None, heads):
            raise UserError(f"--heads {given.heads}, but the YAML file says n_head: {heads}")
        return heads
    if given.heads is None:
        raise UserError(
            "the number of attention heads is not in the tensors: give the original's YAML file "
            "with --config, or --heads N"
        )
    return given.heads


def _classes(description: Mapping[str, Any], given: Given) -> int:
    """The number of classes, 0 for an unconditional transformer."""
    if "cond_stage_config" not in description and not description.get("unconditional"):
        if given.classes is None:
            raise UserError(
                "whether the transformer was given classes is not in the tensors: give the "
                "original's YAML file with --config, or --classes N (0: unconditional)"
            )
        return given.classes
    classes = _said_classes(description)
    if given.classes not in (None, classes):
        raise UserError(f"--classes {given.classes}, but the YAML file says {classes}")
    return classes


def _said_classes(description: Mapping[str, Any]) -> int:
    stage = description.get("cond_stage_config")
    if stage == "__is_unconditional__" or description.get("unconditional"):
        if number(description, "sos_token", 0):
            raise UserError(f"sos_token: {description['sos_token']} is not supported, only 0")
        return 0
    name = stage.get("target") if isinstance(stage, dict) else stage
    if str(name).endswith(".Labelator"):
        return int(
            number(section(section(description, "cond_stage_config"), "params"), "n_classes", 0)
        )
    raise UserError(
        f"cond_stage_config: the transformer knows no condition {name}, only classes (Labelator) "
        f"or none (__is_unconditional__); the first stage can be had with --only first_stage"
    )


def _check_order(permuter: Mapping[str, Tensor]) -> None:
    for name, order in permuter.items():
        if order.ndim != 1 or not torch.equal(order, torch.arange(len(order))):
            raise UserError(
                f"permuter.{name}: this transformer reads the codes in another order than row by "
                f"row, which ours cannot"
            )


def _take_masks(state: dict[str, Tensor]) -> None:
    """Take the masks away, if they are causal."""
    for name in [name for name in state if name.endswith(".attn.mask")]:
        mask = state.pop(name)
        if not torch.equal(mask, _causal(mask.shape[-1])):
            raise UserError(
                f"{TRANSFORMER}{name} is not causal (n_unmasked): our transformer is, always"
            )


def _causal(positions: int) -> Tensor:
    return torch.ones(positions, positions).tril().view(1, 1, positions, positions)
