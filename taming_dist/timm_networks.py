"""Networks of timm, with weights from a file of the user's that is known by its SHA-256."""

import difflib
import hashlib
import importlib
import inspect
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from taming_dist.access import require_readable
from taming_dist.errors import UserError
from taming_dist.formats.sources import one_line
from taming_dist.losses.frozen import FrozenNetwork, last_features
from taming_dist.placeholders import refuse_placeholder
from taming_dist.vision import torchvision_models

EXTRA = "pip install 'taming-dist[features]'"
EXAMPLES = ["vit_small_patch14_dinov2.lvd142m", "convnext_small.fb_in1k"]
# what timm and torch raise where a network cannot be made or weights do not fit
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def timm_network(name: str, path: str, sha256: str, size: int) -> FrozenNetwork:
    """The network that timm calls `name`, for images of `size` pixels, with the weights of a file.

    Raises:
        UserError: timm is missing or has no such network; or the file is missing, is another one
            than that of the SHA-256, or does not fit.
    """
    tensors = read_tensors(Path(path), checked(name, path, sha256))
    with torch.random.fork_rng(devices=[]):
        network = timm_model(name, size, tensors)
    return as_frozen(network, name, size)


def check_timm_network(name: str, path: str, sha256: str) -> None:
    """UserError if timm or the network is missing, or the file is missing or another one."""
    _timm_with(name)
    checked(name, path, sha256)


def blank_timm_network(name: str, size: int) -> FrozenNetwork:
    """The network without memory, to be counted."""
    with torch.device("meta"):
        return as_frozen(timm_model(name, size), name, size)


def timm_model(name: str, size: int, tensors: dict[str, Tensor] | None = None) -> Any:
    """A network of timm with its classifier; `tensors`: its weights, which timm resizes to the
    grid of another `size`. Without them they are random.

    Raises:
        UserError: there is no such network, or it cannot be made with these.
    """
    timm = _timm_with(name)
    given: dict[str, Any] = {}
    if tensors is not None:
        overlay = {"state_dict": tensors, "source": "", "custom_load": False}
        given = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        sized = {"img_size": size} if takes_size(name) else {}
        return timm.create_model(name, **given, **sized)
    except MISFITS as error:
        weights = "" if tensors is None else ", or the weights are not its own"
        raise UserError(
            f"timm cannot make {name} for {size} pixels{weights} ({one_line(error)})"
        ) from error


@cache
def takes_size(name: str) -> bool:
    """Whether a network is made for images of one size, as ViTs are."""
    with torch.device("meta"):
        kind = type(_timm_with(name).create_model(name))
    return "img_size" in inspect.signature(kind).parameters


def as_frozen(network: Any, name: str, size: int) -> FrozenNetwork:
    """A network as losses use it; its features are tried on the shape of an image."""
    settings = network.pretrained_cfg
    try:
        with torch.device("meta"):
            features = last_features(timm_model(name, size), torch.empty(1, 3, size, size))
    except MISFITS as error:
        raise UserError(
            f"{name} of timm gives no feature map for {size} pixels ({one_line(error)}): use "
            f"another network or size"
        ) from error
    return FrozenNetwork(network, size, features.shape[1], settings["mean"], settings["std"])


def checked(name: str, path: str, sha256: str) -> bytes:
    """The contents of a file with the weights of a network.

    Raises:
        UserError: it is missing, or another one.
    """
    require_readable(path)
    if not Path(path).is_file():
        raise UserError(
            f"{path}, the weights of {name}: there is no such file; it is the model.safetensors of "
            f"timm/{name} on the Hugging Face hub"
        )
    refuse_placeholder(path, f"the weights of {name}")
    data = Path(path).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path}, the weights of {name}, has the SHA-256 {found} instead of {sha256}: it is "
            f"damaged or another file"
        )
    return data


def read_tensors(file: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name: .safetensors, or else of `torch.save`, where all but tensors
    and plain containers is refused unmade. `data`: its contents, if they were read already.

    Raises:
        UserError: it has something else in it.
    """
    data = file.read_bytes() if data is None else data
    try:
        if file.suffix == ".safetensors":
            return load(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, *MISFITS) as error:
        raise UserError(f"{file} holds no tensors: {one_line(error)}") from error
    if not (isinstance(found, dict) and all(isinstance(t, Tensor) for t in found.values())):
        raise UserError(f"{file} holds something other than tensors by name")
    return found


def _timm_with(name: str) -> Any:
    """timm, which has the network."""
    try:
        torchvision_models(f"{name} of timm")  # timm imports it, where its operators may not load
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"{name} needs the package timm: {EXTRA}") from error
    if not timm.is_model(name):
        known = timm.list_models(pretrained=True) + timm.list_models()
        close = difflib.get_close_matches(name, known, 3, 0.5) or EXAMPLES
        raise UserError(f"timm {timm.__version__} has no network {name}: use {', '.join(close)}")
    return timm
