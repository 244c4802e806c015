"""How a trained model leaves a run: run.dir/export, loadable without training code or DeepSpeed."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def assemble(model: type, config: Any, state: dict[str, Tensor]) -> Any:
    """A model of its config with the given tensors, without initialising any."""
    with torch.device("meta"):
        network = model(config)
    network.load_state_dict(state, assign=True)
    return network.eval()


def write_export(model: type, config: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and model.safetensors to `folder`, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as building:
        assemble(model, config, state).save_pretrained(building)
        for name in sorted(os.listdir(building)):
            os.replace(Path(building) / name, folder / name)
