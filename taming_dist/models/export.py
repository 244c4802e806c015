"""What a trained model is outside training: `config.json` + `model.safetensors`, and a fingerprint.

Loading and saving is huggingface_hub's PyTorchModelHubMixin; no pickle is ever read.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from taming_dist.access import require_readable, usual_mode
from taming_dist.errors import UserError
from taming_dist.models.joined import as_computed, as_stored
from taming_dist.placeholders import refuse_placeholder

WEIGHTS = "model.safetensors"


@dataclasses.dataclass
class ModelConfig:
    """Base of the configs of exported models, the `model` group of a stage."""

    @staticmethod
    def present(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain values of an export or a run of any age under the present keys."""
        return dict(values)


class Exported(nn.Module, PyTorchModelHubMixin):
    """Base of every exported model: `Model(config)` with a dataclass as its only argument.

    `save_pretrained(folder)` writes config.json and model.safetensors, `from_pretrained(folder)`
    reads them. Subclasses name their `kind`, which tells exports apart.

    `additions`: parameters that a run may add to the export that it starts from, where they begin
    as they are drawn; and by which setting a run has them. `parts`: what `train.freeze` may name,
    and the submodules that each of them is. `training_only`: submodules that exports are without.
    `steering`: buffers that training alone goes by, of which a run may have others than the export
    that it starts from; those that the export lacks begin as ones.
    """

    kind: ClassVar[str]
    additions: ClassVar[Mapping[str, str]] = {}
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    training_only: ClassVar[tuple[str, ...]] = ()
    steering: ClassVar[tuple[str, ...]] = ()
    config: Any

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load an export folder (or a hub id); the model is in eval mode.

        Raises:
            UserError: the folder is an export of another kind or lacks a file.
        """
        missing = UserError(
            f"{folder}: no such export folder (training writes config.json and "
            f"model.safetensors to <run.dir>/export) and no model on the hub"
        )
        require_readable(folder)
        if os.path.isdir(folder):
            check_export(str(folder), cls.kind)
        elif not re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)):
            raise missing
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it reads
                return super().from_pretrained(folder, **kwargs).eval()
        except (OSError, HfHubHTTPError) as error:
            raise missing from error
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{folder}/model.safetensors is damaged or does not fit config.json "
                f"({str(error).splitlines()[0]}): export the model again"
            ) from error

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors by the names by which they are stored (`taming_dist.models.joined`)."""
        return as_stored(self, super().state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take tensors over, by these names."""
        return super().load_state_dict(as_computed(self, state_dict), *args, **kwargs)

    @classmethod
    def _decode_arg(cls, expected_type: Any, value: Any) -> Any:
        """The mixin's hook where config.json becomes the config class."""
        return super()._decode_arg(expected_type, expected_type.present(value))

    def _save_pretrained(self, save_directory: Any) -> None:
        with usual_mode(save_directory / WEIGHTS):
            super()._save_pretrained(save_directory)
        with open(save_directory / "config.json", "w", encoding="utf-8") as file:
            json.dump(self.canonical_config(), file, indent=2, sort_keys=True, allow_nan=False)
            file.write("\n")

    def canonical_config(self) -> dict[str, Any]:
        """The configuration as plain values, with the kind: what config.json holds."""
        return canonical(type(self), self.config)

    @classmethod
    def config_of(cls, values: Mapping[str, Any]) -> Any:
        """The configuration that such plain values are of."""
        return cls._decode_arg(get_type_hints(cls.__init__)["config"], values)

    def freeze(self, parts: Iterable[str]) -> None:
        """Have some of `parts` stay as they are: without gradient, in eval mode."""
        for part in parts:
            for name in self.parts[part]:
                self.get_submodule(name).requires_grad_(False).eval()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the canonical configuration and every tensor of the state, by name.

        Computed from the present tensors: ask for it before casting a model to another dtype.
        """
        return self.fingerprint_of(self.state_dict())

    def fingerprint_of(self, state: Mapping[str, Tensor]) -> str:
        """sha256 (hex) over the canonical configuration and tensors by name."""
        return checksum(self.canonical_config(), sorted(state.items()))


def read_fingerprint(folder: str) -> str:
    """The fingerprint of an export of this version, one tensor in memory at a time.

    Raises:
        UserError: the folder is no complete export.
    """
    check_export(folder, read_kind(folder))
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        with safe_open(os.path.join(folder, WEIGHTS), "pt") as weights:
            names = sorted(weights.keys())
            return checksum(config, ((name, weights.get_tensor(name)) for name in names))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/{WEIGHTS} cannot be read ({error}): export again") from error


def checksum(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, Shaped[Tensor, "..."]]]
) -> str:
    """The fingerprint of a canonical configuration and of named tensors, sorted by name."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def canonical(model: type[Exported], config: Any) -> dict[str, Any]:
    """What config.json holds of a model with a configuration."""
    return {"kind": model.kind, **dataclasses.asdict(config)}


def assemble(model: type, config: Any, state: dict[str, Tensor]) -> Any:
    """A model of its config with the given tensors, without initialising any."""
    with torch.device("meta"):
        network = model(config)
    network.load_state_dict(state, assign=True)
    return network.eval()


def read_kind(folder: str) -> str:
    """The kind of the export in `folder`, "vqgan" or "transformer"; UserError if it is none."""
    path = os.path.join(folder, "config.json")
    require_readable(folder)
    require_readable(path)
    if not os.path.exists(path):
        what = "there is no such folder" if not os.path.isdir(folder) else "it has no config.json"
        raise UserError(f"{folder} is no export, {what}: name a folder like <run.dir>/export")
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no export: {path} is none of an export ({error}); name a folder like "
            f"<run.dir>/export"
        ) from error


def check_export(folder: str, kind: str) -> None:
    """Refuse a folder that is not a complete export of this kind, naming what is wrong."""
    found = read_kind(folder)
    if found != kind:
        raise UserError(f"{folder} is an export of a {found}, but a {kind} is needed here")
    weights = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(weights):
        raise UserError(f"{folder} has no {WEIGHTS}: the export is incomplete")
    require_readable(weights)
    refuse_placeholder(weights, "the weights of a model")
