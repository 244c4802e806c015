"""Weights of tiny networks of timm, in files as timm publishes them; random ones."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from taming_dist.timm_networks import timm_model


def save_timm(folder: Path, name: str) -> dict[str, str]:
    """Write the weights; gives what a term says of its network."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm_model(name, 160)  # what those that timm publishes are for
    save_file(network.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"network": name, "path": str(path), "sha256": sha256}
