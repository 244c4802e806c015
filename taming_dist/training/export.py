"""How a trained model leaves a run: run.dir/export, loadable without training code or DeepSpeed."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.models.export import assemble

UNFINISHED = ".export-"  # how the folder of an export begins that is being written

# Beside a VQGAN, where its discriminator was kept (by tools/import_checkpoint.py); a run may start
# from it too.
DISCRIMINATOR_FILE = "discriminator.safetensors"


def write_export(model: type, config: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and model.safetensors to `folder`, each file whole or not at all."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent) as building:
            assemble(model, config, state).save_pretrained(building)
            for name in sorted(os.listdir(building)):
                os.replace(Path(building) / name, folder / name)


def remove_unfinished_exports(run_dir: Path) -> None:
    """Delete what a run that died while it wrote its export has left beside it."""
    for path in run_dir.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """UserError, naming tensors, unless `given` has the names and shapes of `expected`."""
    shapes = [
        f"{name} ({list(given[name].shape)} instead of {list(expected[name].shape)})"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    faults = {
        "lacks": [name for name in expected if name not in given],
        "has, but the model has not,": [name for name in given if name not in expected],
        "has other sizes of": shapes,
    }
    said = [f"{verb} {_some(names)}" for verb, names in faults.items() if names]
    if said:
        raise UserError(f"{source} {'; it '.join(said)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
