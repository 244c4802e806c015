"""Weights that others have trained, kept in a folder of the user's and known by what they hold."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError


class Pinned(Protocol):
    """One file of weights: where it is kept, the `digest` of its tensors, and what fetches it."""

    @property
    def cache_file(self) -> Path: ...
    @property
    def digest(self) -> str: ...
    @property
    def fetch_command(self) -> str: ...


def load_weights(pinned: Pinned) -> dict[str, Tensor] | None:
    """Read the kept weights, None if there are none; `UserError` if they are not right."""
    if not pinned.cache_file.exists():
        return None
    try:
        tensors = load_file(pinned.cache_file)
    except (SafetensorError, OSError):
        tensors = {}
    if digest(tensors) != pinned.digest:
        raise UserError(
            f"{pinned.cache_file} is damaged: fetch it anew with {pinned.fetch_command}"
        )
    return tensors


def save_weights(pinned: Pinned, tensors: Mapping[str, Tensor]) -> None:
    """Keep verified weights, whole or not at all."""
    assert digest(tensors) == pinned.digest
    pinned.cache_file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(pinned.cache_file, save(dict(tensors)), writer=str(os.getpid()))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, shapes and bytes; it does not depend on the file's writer."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()
