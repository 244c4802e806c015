"""Quantisation: every latent vector becomes one of K codes. docs/quantizers.md compares them.

A quantizer is a class with a config dataclass; `VARIANTS` has both by the name that conf/ uses.
"""

from collections.abc import Callable

from taming_dist.models.quantizers.binary_spherical import BSQuantizer, BSQuantizerConfig
from taming_dist.models.quantizers.ema import EMAQuantizer, EMAQuantizerConfig
from taming_dist.models.quantizers.finite_scalar import FSQuantizer, FSQuantizerConfig
from taming_dist.models.quantizers.gumbel import GumbelQuantizer, GumbelQuantizerConfig
from taming_dist.models.quantizers.index import IndexQuantizer, IndexQuantizerConfig
from taming_dist.models.quantizers.interface import (
    NO_CODE,
    Quantized,
    Quantizer,
    QuantizerConfig,
    ReplaceRows,
    Statistics,
    nearest,
)
from taming_dist.models.quantizers.lookup_free import LFQuantizer, LFQuantizerConfig
from taming_dist.models.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from taming_dist.models.quantizers.product import ProductQuantizer, ProductQuantizerConfig
from taming_dist.models.quantizers.remap import keep_used
from taming_dist.models.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from taming_dist.models.quantizers.simvq import SimVQConfig, SimVQuantizer
from taming_dist.models.quantizers.vector import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "NO_CODE",
    "VARIANTS",
    "BSQuantizer",
    "BSQuantizerConfig",
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
    "MultiScaleConfig",
    "MultiScaleQuantizer",
    "ProductQuantizer",
    "ProductQuantizerConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ReplaceRows",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "SimVQConfig",
    "SimVQuantizer",
    "Statistics",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "build_quantizer",
    "keep_used",
    "nearest",
]

VARIANTS: dict[str, tuple[type[QuantizerConfig], Callable[..., Quantizer]]] = {
    "vector": (VectorQuantizerConfig, VectorQuantizer),
    "ema": (EMAQuantizerConfig, EMAQuantizer),
    "gumbel": (GumbelQuantizerConfig, GumbelQuantizer),
    "fsq": (FSQuantizerConfig, FSQuantizer),
    "lfq": (LFQuantizerConfig, LFQuantizer),
    "bsq": (BSQuantizerConfig, BSQuantizer),
    "ibq": (IndexQuantizerConfig, IndexQuantizer),
    "simvq": (SimVQConfig, SimVQuantizer),
    "multiscale": (MultiScaleConfig, MultiScaleQuantizer),
    "product": (ProductQuantizerConfig, ProductQuantizer),
    "residual": (ResidualQuantizerConfig, ResidualQuantizer),
}


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of its config."""
    return VARIANTS[config.name][1](config)
