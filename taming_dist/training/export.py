"""How a trained model leaves a run: run.dir/export, loadable without training code or DeepSpeed."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from taming_dist.access import usual_mode
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.models.export import WEIGHTS, Exported, assemble, canonical

UNFINISHED = ".export-"  # how the folder of an export begins that is being written

# Beside a VQGAN that was trained with one; a run may start from it too.
DISCRIMINATOR_FILE = "discriminator.safetensors"


@dataclass(frozen=True)
class Export:
    """A trained model on its way out: its class, its config, and its tensors on the CPU; those of
    the discriminator that it was trained against, if there was one, go beside it."""

    model: type[Exported]
    config: Any
    state: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None = None

    @property
    def described(self) -> dict[str, Any]:
        """What its config.json will hold."""
        return canonical(self.model, self.config)

    def write(self, folder: Path) -> None:
        """Write config.json, model.safetensors and discriminator.safetensors to `folder`, each file
        whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent) as building:
            assemble(self.model, self.config, self.state).save_pretrained(building)
            if self.discriminator is not None:
                path = Path(building) / DISCRIMINATOR_FILE
                with usual_mode(path):
                    save_file(self.discriminator, path)
            for name in sorted(os.listdir(building)):
                os.replace(Path(building) / name, folder / name)


def is_exported(folder: Path) -> bool:
    """Whether a model has been written there."""
    return all((folder / name).is_file() for name in ("config.json", WEIGHTS))


def write_export(
    model: type[Exported], config: Any, state: dict[str, Tensor], folder: Path
) -> None:
    """Write a model to `folder`.

    Raises:
        UserError: the disk is full, or the like.
    """
    with writing(folder):
        Export(model, config, state).write(folder)


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
