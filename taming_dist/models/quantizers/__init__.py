"""Quantisation: every latent vector becomes one of K codes. docs/quantizers.md compares them.

A quantizer is a class with a config dataclass; `VARIANTS` has both by the name that conf/ uses.
"""

from typing import Any

from taming_dist.errors import UserError
from taming_dist.models.quantizers.ema import EMAQuantizer, EMAQuantizerConfig
from taming_dist.models.quantizers.finite_scalar import FSQuantizer, FSQuantizerConfig
from taming_dist.models.quantizers.gumbel import GumbelQuantizer, GumbelQuantizerConfig
from taming_dist.models.quantizers.index import IndexQuantizer, IndexQuantizerConfig
from taming_dist.models.quantizers.interface import (
    NO_CODE,
    Quantized,
    Quantizer,
    ReplaceRows,
    Statistics,
    nearest,
)
from taming_dist.models.quantizers.lookup_free import LFQuantizer, LFQuantizerConfig
from taming_dist.models.quantizers.remap import keep_used
from taming_dist.models.quantizers.vector import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "NO_CODE",
    "VARIANTS",
    "EMAQuantizer",
    "EMAQuantizerConfig",
    "FSQuantizer",
    "FSQuantizerConfig",
    "GumbelQuantizer",
    "GumbelQuantizerConfig",
    "IndexQuantizer",
    "IndexQuantizerConfig",
    "LFQuantizer",
    "LFQuantizerConfig",
    "Quantized",
    "Quantizer",
    "ReplaceRows",
    "Statistics",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "build_quantizer",
    "keep_used",
    "nearest",
    "quantizer_config",
]

VARIANTS: dict[str, tuple[Any, Any]] = {
    "vector": (VectorQuantizerConfig, VectorQuantizer),
    "ema": (EMAQuantizerConfig, EMAQuantizer),
    "gumbel": (GumbelQuantizerConfig, GumbelQuantizer),
    "fsq": (FSQuantizerConfig, FSQuantizer),
    "lfq": (LFQuantizerConfig, LFQuantizer),
    "ibq": (IndexQuantizerConfig, IndexQuantizer),
}


def quantizer_config(values: Any) -> Any:
    """The config dataclass of a quantizer from plain values with its `name` (config.json)."""
    if not isinstance(values, dict):
        return values
    if values.get("name") not in VARIANTS:
        raise UserError(f"model.quantizer.name={values.get('name')}: use one of {sorted(VARIANTS)}")
    return VARIANTS[values["name"]][0](**values)


def build_quantizer(config: Any) -> Quantizer:
    """The quantizer of its config."""
    return VARIANTS[config.name][1](config)
