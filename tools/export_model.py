"""Copy a trained model out of its run, as an export or as a checkpoint of the original.

python tools/export_model.py RUN|EXPORT --out DIR [--format taming]
See docs/checkpoints.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taming_dist import cli
from taming_dist.engine.checkpoint import newest_valid, read_meta
from taming_dist.errors import UserError
from taming_dist.models.export import read_kind
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.files import write_checkpoint
from taming_dist.taming_compat.first_stage import export_vqgan
from taming_dist.taming_compat.transformer import export_transformer
from taming_dist.training.export import write_export

KINDS: dict[str, Any] = {"vqgan": VQGAN, "transformer": Transformer}


def main(argv: Sequence[str] | None = None) -> None:
    """Find the export and write it in the requested format."""
    options = parse(argv)
    folder, step = locate(options.model)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder: choose another")
    if options.out.resolve() == folder.resolve():
        raise UserError(f"--out {options.out} is the export itself: choose another folder")
    model = KINDS[read_kind(str(folder))].from_pretrained(folder)
    if options.format == "export":
        write_export(type(model), model.config, model.state_dict(), options.out)
        print(f"{options.out}: {model.kind}, {model.fingerprint[:12]}")
        return
    if isinstance(model, VQGAN):
        tensors, described = export_vqgan(model)
        description = {"model": described}
    elif options.vqgan is None:
        raise UserError("a transformer's checkpoint includes its VQGAN: give it with --vqgan")
    else:
        second = options.condition_vqgan and VQGAN.from_pretrained(options.condition_vqgan)
        tensors, description = export_transformer(
            model, VQGAN.from_pretrained(options.vqgan), second
        )
    write_checkpoint(tensors, description, step, options.out)
    print(f"{options.out}: last.ckpt with {len(tensors)} tensors, and config.yaml")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("model", type=Path, metavar="RUN|EXPORT", help="run directory, or its export")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--format", choices=("export", "taming"), default="export", help="what to write")
    add("--vqgan", type=Path, metavar="EXPORT", help="the VQGAN whose codes a transformer learned")
    add("--condition-vqgan", type=Path, metavar="EXPORT", help="the VQGAN of its condition")
    return parser.parse_args(argv)


def locate(path: Path) -> tuple[Path, int]:
    """The export that is meant, and its optimizer step (0 if unknown).

    A run writes its export at every checkpoint, just before it.
    """
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        return path, 0
    if not (path / "export" / "config.json").is_file():
        raise UserError(f"{path} has no export yet: it is written with the run's first checkpoint")
    newest = newest_valid(path / "checkpoints", report=print)
    return path / "export", read_meta(newest)["step"] if newest else 0


if __name__ == "__main__":
    cli.run(main)
