"""Copy a trained model out of its run, as an export or as a checkpoint of the original.

python tools/export_model.py RUN|EXPORT --out DIR [--format taming] [--from-checkpoint]
See docs/checkpoints.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from taming_dist import cli
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.finding import newest_valid
from taming_dist.engine.meta import read_meta
from taming_dist.engine.pieces import Pieces
from taming_dist.engine.state import AVERAGE, BUFFERS, WEIGHTS
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.models.export import assemble, read_kind
from taming_dist.models.joined import stored_parameters
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.files import write_checkpoint
from taming_dist.taming_compat.first_stage import export_vqgan
from taming_dist.taming_compat.transformer import export_transformer
from taming_dist.training.export import is_exported, write_export

ALONE = World(0, 1, 0, torch.device("cpu"))
KINDS: dict[str, Any] = {"vqgan": VQGAN, "transformer": Transformer}


def main(argv: Sequence[str] | None = None) -> None:
    """Find the export and write it in the requested format."""
    options = parse(argv)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder: choose another")
    model, step = read(options.model, options.out, options.from_checkpoint)
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
    add("--from-checkpoint", action="store_true", help="of the run's newest one, not its export")
    add("--format", choices=("export", "taming"), default="export", help="what to write")
    add("--vqgan", type=Path, metavar="EXPORT", help="the VQGAN whose codes a transformer learned")
    add("--condition-vqgan", type=Path, metavar="EXPORT", help="the VQGAN of its condition")
    return parser.parse_args(argv)


def read(path: Path, out: Path, from_checkpoint: bool) -> tuple[Any, int]:
    """The model that is meant, and its optimizer step (0 if unknown): that of an export; or of a
    run, of its export or else its newest checkpoint, just before which the export is written."""
    folder, step = path, 0
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        folder = path / "export"
        if from_checkpoint or not is_exported(folder):
            newest = Checkpoints(path / "checkpoints", ALONE).latest_valid(report=print)
            if newest is None:
                raise UserError(
                    f"{path} has no export and no checkpoint yet: both are written at the first "
                    f"train.checkpoint_every"
                )
            return from_pieces(newest), read_meta(newest).step
        newest = newest_valid(path / "checkpoints", report=print)
        step = read_meta(newest).step if newest else 0
    if out.resolve() == folder.resolve():
        raise UserError(f"--out {out} is the export itself: choose another folder")
    return KINDS[read_kind(str(folder))].from_pretrained(folder), step


def from_pieces(checkpoint: Path) -> Any:
    """The model in a checkpoint, as the run exports it: with the averaged weights if there are."""
    meta = read_meta(checkpoint)
    if not meta.model:
        raise UserError(
            f"{checkpoint} is of a version that did not note its model: continue the run, which "
            f"writes its export again"
        )
    kind = KINDS[meta.model["kind"]]
    config = kind.config_of(meta.model)
    with torch.device("meta"):
        network = kind(config)
    pieces = Pieces(checkpoint / meta.exported, 0)
    state = {}
    for stored in stored_parameters(network):
        name = stored.name
        kind_of = AVERAGE if f"{AVERAGE}/{name}" in pieces else WEIGHTS
        state[name] = filled(pieces, f"{kind_of}/{name}", stored.of(stored.parameter))
    for name, buffer in network.named_buffers():
        state[name] = filled(pieces, f"{BUFFERS}/{name}", buffer)
    return assemble(kind, config, state)


def filled(pieces: Pieces, name: str, like: torch.Tensor) -> torch.Tensor:
    """A tensor of a checkpoint, whole."""
    values = torch.empty(like.numel(), dtype=like.dtype)
    pieces.fill(name, 0, values)
    return values.view(like.shape)


if __name__ == "__main__":
    cli.run(main)
