"""Make exports from a checkpoint of the original: VQGANs, transformers, latent diffusion's VQ.

python tools/import_checkpoint.py last.ckpt --out DIR [--config model.yaml]
See docs/checkpoints.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.models.export import Exported
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.files import read_description, read_tensors, write_tensors
from taming_dist.taming_compat.first_stage import (
    ASIDE,
    DISCRIMINATOR,
    import_vqgan,
    section,
    set_aside,
)
from taming_dist.taming_compat.transformer import (
    CONDITION,
    FIRST_STAGE,
    TRANSFORMER,
    Given,
    below,
    import_transformer,
)
from taming_dist.training.export import DISCRIMINATOR_FILE, write_export

# --only NAME -> the place of this stage in the tensors and in the YAML file of a transformer
STAGES = {
    "first_stage": (FIRST_STAGE, "first_stage_config"),
    "cond_stage": (CONDITION, "cond_stage_config"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the checkpoint, identify it, and write its export or exports."""
    options = parse(argv)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder: choose another")
    tensors = read_tensors(options.checkpoint)
    description = read_description(options.config) if options.config else {}
    if options.only:
        prefix, name = STAGES[options.only]
        tensors = below(tensors, prefix)
        if not tensors:
            raise UserError(f"{options.checkpoint} has no {prefix}*: omit --only")
        description = section(section(description, name), "params")
    if options.discriminator and not below(tensors, DISCRIMINATOR):
        raise UserError(f"{options.checkpoint} has no {DISCRIMINATOR}*: omit --discriminator")
    if any(name.startswith(TRANSFORMER) for name in tensors):
        convert_transformer(tensors, description, options)
    else:
        write(read_vqgan(tensors, description, options.resolution), options.out)
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
    add("--heads", type=cli.COUNT, help="attention heads of a transformer, without a YAML file")
    add(
        "--classes",
        type=cli.number(int, at_least=0),
        help="classes of a transformer's condition, or 0, without a YAML file",
    )
    add("--vqgan", type=Path, metavar="EXPORT", help="first stage, if the checkpoint lacks it")
    add("--discriminator", action="store_true", help="also keep the discriminator")
    return parser.parse_args(argv)


def convert_transformer(
    tensors: dict[str, Tensor], description: dict[str, Any], options: argparse.Namespace
) -> None:
    """Write the transformer to --out and its first stage to vqgan/ below it."""
    stage = below(tensors, FIRST_STAGE)
    if stage and options.vqgan:
        raise UserError(f"{options.checkpoint} has {FIRST_STAGE}* itself: omit --vqgan")
    if options.vqgan:
        vqgan = VQGAN.from_pretrained(options.vqgan)
    elif stage:
        said = section(section(description, "first_stage_config"), "params")
        vqgan = read_vqgan(stage, said, options.resolution)
    else:
        raise UserError(
            f"{options.checkpoint} has no {FIRST_STAGE}*: import its VQGAN first, and give that "
            f"export with --vqgan"
        )
    given = Given(options.heads, options.classes)
    transformer = import_transformer(tensors, description, vqgan, given)
    if stage:
        write(vqgan, options.out / "vqgan")
    write(transformer, options.out)


def read_vqgan(
    tensors: dict[str, Tensor], description: dict[str, Any], resolution: int | None
) -> VQGAN:
    kept, counts = set_aside(tensors)
    vqgan = import_vqgan(kept, description, resolution, label_map="colorize" in counts)
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
