"""Tiny models that tests of several folders work with."""

from pathlib import Path
from typing import Any

import torch

from taming_dist.models.modalities import Modality
from taming_dist.models.networks import MaskGITConfig, ViTConfig
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, FirstStageConfig, VQGANConfig


def tiny_config(quantizer: Any, resolution: int = 8, **settings: Any) -> VQGANConfig:
    """The settings of a VQGAN of 2 pixels per code without attention; others are as given."""
    usual = {
        "channels": 32,
        "multipliers": [1, 1],
        "blocks": 1,
        "attention_resolutions": [],
        "latent_channels": 4,
    }
    return VQGANConfig(quantizer, resolution, **usual | settings)


def tiny_networks(kind: type[FirstStageConfig]) -> FirstStageConfig:
    """MaskGIT's networks or vision transformers for images of 32 pixels, 4 of them per code."""
    sizes: dict[type, dict[str, Any]] = {
        MaskGITConfig: {"channels": 32, "multipliers": [1, 2, 1], "blocks": 1},
        ViTConfig: {"patch": 4, "width": 16, "depth": 1, "heads": 2, "registers": 2},
    }
    return kind(VectorQuantizerConfig(codes=24, dim=8), 32, **sizes[kind])


def save_vqgan(folder: Path, modality: Modality, codes: int, resolution: int = 8) -> VQGAN:
    """Export an untrained VQGAN of 2 pixels per code whose pictures use many of its codes."""
    torch.manual_seed(codes)
    quantizer = VectorQuantizerConfig(codes=codes, dim=4, normalized=True)
    config = tiny_config(quantizer, resolution, latent_channels=32, modality=modality)
    model = VQGAN(config).eval()
    model.save_pretrained(folder)
    return model


def save_transformer(folder: Path, vqgan: VQGAN, **settings: Any) -> Path:
    """Export an untrained transformer on its codes, for images of its resolution."""
    torch.manual_seed(1)
    side = vqgan.config.resolution // vqgan.config.factor
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "width": 8, "grid": [side, side]}
    known = {"vocabulary": vqgan.config.vocabulary, "vqgan_fingerprint": vqgan.fingerprint}
    model = Transformer(TransformerConfig(**sizes | known | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    model.save_pretrained(folder)
    return folder
