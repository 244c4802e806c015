"""Make exports from a checkpoint of the original (VQGANs, transformers), latent diffusion's VQ,
LlamaGen's or MaskGIT's.

python tools/import_checkpoint.py last.ckpt --out DIR [--config model.yaml]
See docs/checkpoints.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.models.export import Exported
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.conditions import (
    IS_FIRST_STAGE,
    Given,
    Said,
    described_tokenizer,
    tokenizer,
)
from taming_dist.taming_compat.description import (
    CONDITION_STAGE,
    FIRST_STAGE_CONFIG,
    class_name,
    stage_description,
)
from taming_dist.taming_compat.files import (
    Description,
    read_description,
    read_tensors,
    write_tensors,
)
from taming_dist.taming_compat.first_stage import (
    ASIDE,
    DISCRIMINATOR,
    set_aside,
    with_key,
)
from taming_dist.taming_compat.layouts import import_first_stage
from taming_dist.taming_compat.transformer import (
    CONDITION,
    FIRST_STAGE,
    TRANSFORMER,
    below,
    import_transformer,
)
from taming_dist.training.export import DISCRIMINATOR_FILE, write_export


class Stage(NamedTuple):
    """A VQGAN inside a transformer's checkpoint: how its tensors' names start, its place in the
    YAML file, and the option that gives it where the checkpoint lacks it."""

    prefix: str
    section: str
    option: str


# --only NAME -> the stage
STAGES = {
    "first_stage": Stage(FIRST_STAGE, FIRST_STAGE_CONFIG, "--vqgan"),
    "cond_stage": Stage(CONDITION, CONDITION_STAGE, "--condition-vqgan"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the checkpoint, identify it, and write its export or exports."""
    options = parse(argv)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder: choose another")
    tensors = read_tensors(options.checkpoint)
    description = read_description(options.config) if options.config else Description({}, {})
    model = description.model
    if options.only:
        only = STAGES[options.only]
        tensors = below(tensors, only.prefix)
        if not tensors:
            raise UserError(f"{options.checkpoint} has no {only.prefix}*: omit --only")
        model = stage_description(model, only.section)
    if options.discriminator and not below(tensors, DISCRIMINATOR):
        raise UserError(f"{options.checkpoint} has no {DISCRIMINATOR}*: omit --discriminator")
    second_stage = any(name.startswith(TRANSFORMER) for name in tensors)
    if model and second_stage != ("transformer_config" in model):
        kind = "a Net2NetTransformer" if second_stage else "a VQGAN"
        raise UserError(f"{options.checkpoint} is {kind}, but {options.config} describes none")
    if second_stage:
        convert_transformer(tensors, description, options)
    else:
        write(read_vqgan(tensors, model, options.resolution), options.out)
    if options.discriminator:
        path = options.out / DISCRIMINATOR_FILE
        write_tensors(below(tensors, DISCRIMINATOR), path)
        print(f"{path}: the discriminator, for run.init={options.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="last.ckpt, or a .safetensors file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the export")
    add("--config", type=Path, metavar="YAML", help="the original's YAML file of the model")
    add("--only", choices=sorted(STAGES), help="one VQGAN from a transformer's checkpoint")
    add("--resolution", type=cli.COUNT, help="pixels, without a YAML file (default: 256)")
    add("--discriminator", action="store_true", help="also keep the discriminator")
    transformer = parser.add_argument_group("of a transformer, what its checkpoint does not say")
    add = transformer.add_argument
    add("--heads", type=cli.COUNT, help="attention heads, without a YAML file")
    condition = transformer.add_mutually_exclusive_group().add_argument
    condition(
        "--classes",
        type=cli.number(int, at_least=0),
        help="classes that it is conditioned on, or 0 (unconditional), without a YAML file",
    )
    condition(
        "--coordinates",
        type=cli.COUNT,
        metavar="STEPS",
        help="it is conditioned on coordinates in so many steps, without a YAML file",
    )
    add("--condition-size", type=cli.COUNT, metavar="PIXELS", help="of what the condition encodes")
    add("--categories", type=cli.COUNT, help="categories of the objects of a layout's condition")
    add("--vqgan", type=Path, metavar="EXPORT", help="first stage, if the checkpoint lacks it")
    add(
        "--condition-vqgan",
        type=Path,
        metavar="EXPORT",
        help="VQGAN of the condition, if the checkpoint lacks it",
    )
    return parser.parse_args(argv)


def convert_transformer(
    tensors: dict[str, Tensor], description: Description, options: argparse.Namespace
) -> None:
    """Write the transformer to --out, and the VQGANs of its checkpoint to folders below it."""
    model, placed = description.model, options.resolution
    first = read_stage(STAGES["first_stage"], tensors, model, options.vqgan, placed)
    if class_name(model, CONDITION_STAGE) == IS_FIRST_STAGE:
        second = first and with_key(first, model.get("cond_stage_key"))
    else:
        placed = None if model else placed
        second = read_stage(STAGES["cond_stage"], tensors, model, options.condition_vqgan, placed)
    known = tokenizer(first) if first else described_tokenizer(model, FIRST_STAGE_CONFIG)
    if known is None:
        raise UserError(
            f"{options.checkpoint} has no {FIRST_STAGE}*: import its VQGAN first, and give that "
            f"export with --vqgan"
        )
    given = Given(
        options.heads,
        options.classes,
        options.coordinates,
        options.condition_size,
        options.categories,
    )
    said = Said(model, description.data, given, known, tokenizer(second) if second else None)
    transformer = import_transformer(tensors, said)
    tokens = transformer.config.vocabulary
    if tokens > known.codes:
        print(
            f"it has {tokens} tokens for the {known.codes} codes of its first stage: logits are "
            f"the original's, but sampling and training want as many of both"
        )
    if first is None:
        print(f"no {FIRST_STAGE}* and no --vqgan: the export does not say whose codes it knows")
    elif not options.vqgan:
        write(first, options.out / "vqgan")
    if second is not None and not options.condition_vqgan:
        write(second, options.out / "condition_vqgan")
    write(transformer, options.out)


def read_stage(
    stage: Stage,
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    given: Path | None,
    resolution: int | None,
) -> VQGAN | None:
    """A VQGAN of a transformer's checkpoint, or the one given in its place; None without both."""
    found = below(tensors, stage.prefix)
    if found and given:
        raise UserError(f"the checkpoint has {stage.prefix}* itself: omit {stage.option}")
    if found:
        return read_vqgan(found, stage_description(description, stage.section), resolution)
    return VQGAN.from_pretrained(given) if given else None


def read_vqgan(
    tensors: dict[str, Tensor], description: dict[str, Any], resolution: int | None
) -> VQGAN:
    kept, counts = set_aside(tensors)
    vqgan = import_first_stage(kept, description, resolution, label_map="colorize" in counts)
    for prefix, count in counts.items():
        print(f"left out: {count} tensors {prefix}* ({ASIDE[prefix]})")
    return vqgan


def write(model: Exported, folder: Path) -> None:
    write_export(type(model), model.config, model.state_dict(), folder)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{folder}: {model.kind}, {millions:.3f} M parameters, {model.fingerprint[:12]}")
    print(f"  {model.config}")


if __name__ == "__main__":
    cli.run(main)
