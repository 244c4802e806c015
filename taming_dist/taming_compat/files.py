"""The files of the original: lightning checkpoints (or safetensors) and the YAML beside them."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taming_dist.access import require_readable, usual_mode
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.placeholders import refuse_placeholder

# Where a file has its state dict, the first of them that it has.
WITHIN = ("ema", "model", "state_dict")
# Classes that lightning 1 uses as names of its callbacks' states.
CALLBACKS = "pytorch_lightning.callbacks."


class Unread:
    """Stands where a checkpoint names a class of lightning's; does nothing."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, on the CPU, mapped from the file where its format allows.

    `path` is a torch file, {"state_dict": ...}, {"model": ...} (of LlamaGen, beside which "ema" is
    the average that it samples with) or the state dict itself, or a .safetensors file.

    Raises:
        UserError: there is no such file, it is damaged, or it holds objects that are not tensors.
    """
    require_readable(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    refuse_placeholder(path, "a checkpoint")
    contents = _read_safe(path) if path.suffix == ".safetensors" else _unpickle(path)
    state: dict[Any, Any] = contents if isinstance(contents, dict) else {}
    state = next((state[key] for key in WITHIN if isinstance(state.get(key), dict)), state)
    if not state:
        raise UserError(f"{path} holds no state_dict: name a checkpoint of a model")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name} is no tensor: name a checkpoint of a model")
    return {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in state.items()
    }


def _read_safe(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from error


def _unpickle(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)  # the format since torch 1.6, which alone can be mapped
    if not zipped:
        _refuse_what_is_no_pickle(path)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        inert: list[Any] = [(Unread, name) for name in foreign if name.startswith(CALLBACKS)]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        others = sorted(name for name in foreign if not name.startswith(CALLBACKS))
        held = ", ".join(others) or str(error).splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors ({held}), and nothing else is read: if you trust the "
            f"file, load it where it was written and save its state_dict alone, with "
            f"torch.save(checkpoint['state_dict'], FILE)"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise UserError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}): fetch it "
            f"again"
        ) from error


def _refuse_what_is_no_pickle(path: Path) -> None:
    """Raise `UserError` for what torch would take for an old checkpoint with forbidden contents."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(b"\x80"):
        return
    fault = "is not a PyTorch checkpoint" if start else "is empty"
    if start.startswith(b"PK"):
        fault = "is cut off or damaged"
    raise UserError(f"{path} {fault}: fetch it again")


class Description(NamedTuple):
    """What a YAML file says: the parameters of the model and those of its training data."""

    model: dict[str, Any]
    data: dict[str, Any]


def read_description(path: Path) -> Description:
    """The parameters in a YAML file of the original; classes it names are not used.

    Raises:
        UserError: there is no such file, or it does not describe a model.
    """
    require_readable(path)
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Description(dict(contents["model"]["params"]), _training_set(contents))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has no model.params: name the YAML file of the original's model "
            f"(...-project.yaml)"
        ) from error


def _training_set(contents: Any) -> dict[str, Any]:
    """data.params.train.params of a YAML file; empty if they are not there."""
    for name in ("data", "params", "train", "params"):
        contents = contents.get(name) if isinstance(contents, dict) else None
    return contents if isinstance(contents, dict) else {}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when all is written."""
    building = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path.parent):
            yield building
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a .safetensors file, whole or not at all."""
    with replacing(path) as building, usual_mode(building):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, building)


def write_checkpoint(
    tensors: dict[str, Tensor], description: dict[str, Any], step: int, folder: Path
) -> None:
    """Write folder/last.ckpt and folder/config.yaml, each whole or not at all.

    `description`: the contents of the YAML file, of which `model` is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "last.ckpt") as path:
        state = {name: _alone(tensor.detach()) for name, tensor in tensors.items()}
        torch.save({"state_dict": state, "global_step": step}, path)
    with replacing(folder / "config.yaml") as path:
        path.write_text(yaml.safe_dump(description, sort_keys=False))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view, which would bring all of its storage along."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
