"""The original's second stage (Net2NetTransformer): a transformer, with its VQGANs inside it.

The transformer's tensors have the same names here and there, below `transformer.`; the VQGANs of
image and condition are below `first_stage_model.` and `cond_stage_model.`. Heads and most
conditions are not in the tensors, only in the YAML file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.export import assemble
from taming_dist.models.prior.blocks import GPTBlockConfig
from taming_dist.models.prior.orders import Order
from taming_dist.models.prior.schemes import NextIndex
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.conditions import (
    EXPORTED,
    Given,
    Said,
    Tokenizer,
    export_condition,
    export_data,
    import_condition,
)
from taming_dist.taming_compat.description import check_said, instance, number, params
from taming_dist.taming_compat.first_stage import export_vqgan
from taming_dist.taming_compat.orders import export_order, import_order
from taming_dist.training.export import check_tensors

# how the names of the parts' tensors start
TRANSFORMER, FIRST_STAGE, CONDITION = "transformer.", "first_stage_model.", "cond_stage_model."
PERMUTER = "permuter."
PARTS = (TRANSFORMER, FIRST_STAGE, CONDITION, PERMUTER)
MASK = ".attn.mask"  # how those of each layer's mask end
ORIGINAL_HEADS = 8  # where its YAML says nothing


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def import_transformer(tensors: Mapping[str, Tensor], said: Said) -> Transformer:
    """A transformer from all tensors of a Net2NetTransformer.

    Raises:
        UserError: tensors are missing or unknown, the condition or the order of codes is none of
            ours, or heads or condition are not said anywhere.
    """
    unknown = sorted(name for name in tensors if not name.startswith(PARTS))
    if unknown:
        raise UserError(
            f"the checkpoint has {unknown[0]}{' and more' * (len(unknown) > 1)}, which is no part "
            f"of a Net2NetTransformer: save it without, as a state_dict of {', '.join(PARTS)}"
        )
    state = below(tensors, TRANSFORMER)
    config = infer(
        state, import_order(below(tensors, PERMUTER), said.description, said.first.grid), said
    )
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(MASK)}
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    check_tensors(expected, weights, "the checkpoint's transformer")
    return assemble(Transformer, config, weights)


def infer(state: Mapping[str, Tensor], order: Order, said: Said) -> TransformerConfig:
    """The architecture, from the tensors of the transformer and from what is said beyond them."""
    for name in ("tok_emb.weight", "pos_emb"):
        if name not in state:
            raise UserError(f"{TRANSFORMER}{name} is missing: this is no Net2NetTransformer")
    gpt = params(said.description, "transformer_config")
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    config = TransformerConfig(
        vocabulary=state["tok_emb.weight"].shape[0],
        grid=list(said.first.grid),
        block_size=state["pos_emb"].shape[1],
        layers=len(layers),
        heads=_heads(gpt, said.given),
        width=state["tok_emb.weight"].shape[1],
        dropout_embedding=number(gpt, "embd_pdrop", 0.0),
        dropout_attention=number(gpt, "attn_pdrop", 0.0),
        dropout_residual=number(gpt, "resid_pdrop", 0.0),
        condition=import_condition(said, state["tok_emb.weight"].shape[0]),
        block=GPTBlockConfig(_unmasked(state, gpt)),
        order=order,
        scheme=NextIndex(number(said.description, "pkeep", 1.0)),
        vqgan_fingerprint=said.first.fingerprint,
        condition_table="shared",
    )
    check_said(describe(config), gpt)
    _check_fit(config, said.first)
    return config


def _check_fit(config: TransformerConfig, first: Tokenizer) -> None:
    """Raise a UserError if the sizes of transformer, VQGAN and condition do not fit together."""
    positions, needed = config.block_size, config.condition.length + config.num_tokens - 1
    if positions < needed:
        raise UserError(
            f"{TRANSFORMER}pos_emb has {positions} positions for {config.condition.length} of the "
            f"condition and {config.grid[0]} x {config.grid[1]} codes of an image of "
            f"{first.pixels} pixels: give the model's --resolution"
        )
    for codes, whose in ((first.codes, "first stage"), (config.condition.vocabulary, "condition")):
        if codes > config.vocabulary:
            raise UserError(
                f"{TRANSFORMER}tok_emb.weight has {config.vocabulary} rows for the {codes} codes "
                f"of its {whose}: they do not belong together"
            )


def describe(config: TransformerConfig) -> dict[str, Any]:
    """The sizes as the original's YAML has them."""
    sizes = {
        "vocab_size": config.vocabulary,
        "block_size": config.positions,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "embd_pdrop": config.dropout_embedding,
        "resid_pdrop": config.dropout_residual,
        "attn_pdrop": config.dropout_attention,
    }
    return sizes | ({"n_unmasked": config.block.unmasked} if config.block.unmasked else {})


def export_transformer(
    transformer: Transformer, vqgan: VQGAN, condition_vqgan: VQGAN | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a Net2NetTransformer, and the contents of its YAML file.

    `condition_vqgan`: the one whose codes are its condition, if it has such a condition.

    Raises:
        UserError: a VQGAN is not the one whose codes the transformer learned, or the original has
            no place for one of its parts.
    """
    config = transformer.config
    _check_parts(config)
    if config.vqgan_fingerprint and not vqgan.wrote(config.vqgan_fingerprint):
        raise UserError(
            f"the VQGAN has the fingerprint {vqgan.tokenizer_fingerprint}, but the transformer "
            f"learned the codes of {config.vqgan_fingerprint}: name that VQGAN"
        )
    stage, first_stage = export_vqgan(vqgan)
    places, order = export_order(config.order, config.code_grid)
    condition_stage, condition = export_condition(config, vqgan, condition_vqgan)
    mask = _mask(config.positions, config.block.unmasked)
    state = transformer.state_dict() | {
        f"blocks.{layer}{MASK}": mask for layer in range(config.layers)
    }
    gpt = instance("taming.modules.transformer.mingpt.GPT", describe(config))
    described = {"transformer_config": gpt, "first_stage_config": first_stage} | condition | order
    tensors = {f"{TRANSFORMER}{name}": value for name, value in state.items()}
    tensors |= {f"{FIRST_STAGE}{name}": value for name, value in stage.items()}
    tensors |= {f"{CONDITION}{name}": value for name, value in condition_stage.items()}
    tensors |= {f"{PERMUTER}{name}": value for name, value in places.items()}
    model = instance("taming.models.cond_transformer.Net2NetTransformer", described)
    data = export_data(config.condition)
    return tensors, {"model": model} | ({"data": _training_set(data)} if data else {})


def _training_set(parameters: dict[str, Any]) -> dict[str, Any]:
    """The place of the training data's parameters in a YAML file."""
    return {"params": {"train": {"params": parameters}}}


def _check_parts(config: TransformerConfig) -> None:
    """Raise a UserError for a part or a table for which the original has no place."""
    known = {"condition": EXPORTED, "block": (GPTBlockConfig,), "scheme": (NextIndex,)}
    for part, kinds in known.items():
        found = getattr(config, part)
        if type(found) not in kinds:
            raise UserError(
                f"a transformer with model/{part}={found.name} cannot be written in the original's "
                f"format: give its export itself"
            )
    if config.condition_table == "own":
        raise UserError(
            "this transformer has a table for its condition alone (model.condition_table=own), and "
            "the original's format has one for classes and codes together: give its export itself, "
            "or train with model.condition_table=shared"
        )
    if config.null_prefix:
        raise UserError(
            "this transformer was trained with dropped conditions (loss.condition_dropout), and "
            "the original's format has no place for the prefix that stands for them: give its "
            "export itself, or train without"
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


def _unmasked(state: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
    """How many of the first positions see each other in the masks, or, without masks, are said to.

    Raises:
        UserError: a mask hides something else, or the masks differ.
    """
    masks = {name: tensor for name, tensor in state.items() if name.endswith(MASK)}
    if not masks:
        return int(number(said, "n_unmasked", 0))
    # what the first position sees: itself alone if the mask is causal
    seen = int(next(iter(masks.values())).flatten(0, -2)[0].sum())
    found = seen if seen > 1 else 0
    for name, mask in masks.items():
        if not torch.equal(mask.float(), _mask(mask.shape[-1], found)):
            raise UserError(
                f"{TRANSFORMER}{name} is neither causal nor open between the first positions alone "
                f"(n_unmasked): no block here attends like that"
            )
    if found:
        check_said({"n_unmasked": found}, said)
    return found


def _mask(positions: int, unmasked: int) -> Tensor:
    """What a position sees: those up to its own, and the first ones see each other."""
    mask = torch.ones(positions, positions).tril()
    mask[:unmasked, :unmasked] = 1
    return mask.view(1, 1, positions, positions)
