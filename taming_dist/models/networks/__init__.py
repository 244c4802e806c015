"""The networks that a VQGAN may be made of, by their config classes.

`NETWORKS` has them by the name that the files in conf/model list in their defaults.
"""

from collections.abc import Mapping
from typing import Any

from taming_dist.errors import UserError
from taming_dist.models.first_stage import FirstStageConfig
from taming_dist.models.networks.maskgit import MaskGITConfig
from taming_dist.models.networks.taming import VQGANConfig
from taming_dist.models.networks.vit import ViTConfig

__all__ = ["NETWORKS", "MaskGITConfig", "VQGANConfig", "ViTConfig", "networks_of"]

NETWORKS: dict[str, type[FirstStageConfig]] = {
    "vqgan": VQGANConfig,
    "maskgit": MaskGITConfig,
    "vit": ViTConfig,
}


def networks_of(values: Mapping[str, Any]) -> type[FirstStageConfig]:
    """The config class that plain values, such as config.json's, are of: those without a `name` are
    the paper's."""
    name = values.get("name", next(iter(NETWORKS)))
    if name not in NETWORKS:
        raise UserError(
            f"the export has networks of a kind {name}: use one of {', '.join(NETWORKS)}"
        )
    return NETWORKS[name]
