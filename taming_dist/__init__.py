"""taming_dist: VQGANs and the transformers on their codes, from a laptop to a Slurm cluster.

`from taming_dist import VQGAN, Transformer, Generator` is all that using a trained model needs;
the names are looked up on first use, so that importing the package costs nothing.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Generator", "Transformer", "VQGAN"]

_HOME = {
    "VQGAN": "taming_dist.models.vqgan",
    "Transformer": "taming_dist.models.prior.transformer",
    "Generator": "taming_dist.generation.generator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'taming_dist' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
