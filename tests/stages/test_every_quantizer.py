"""The whole way with every quantizer, in one process: an export of stage 1, shards of codes, a
transformer that learns them, its export, pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.data.codes import CodeDataset
from taming_dist.generation.generator import Generator
from taming_dist.models.prior.schemes.next_scale import NextScale
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.quantizers import (
    VARIANTS,
    BSQuantizerConfig,
    EMAQuantizerConfig,
    FSQuantizerConfig,
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    LFQuantizerConfig,
    MultiScaleConfig,
    ProductQuantizerConfig,
    QuantizerConfig,
    ResidualQuantizerConfig,
    SimVQConfig,
    VectorQuantizerConfig,
)
from taming_dist.models.vqgan import VQGAN
from tests.stages.tokenized import SAMPLES, learned, tokenized

SCALES = [1, 2, 4]
CONFIGS: list[QuantizerConfig] = [
    VectorQuantizerConfig(codes=24, dim=4),
    EMAQuantizerConfig(codes=24, dim=4),
    GumbelQuantizerConfig(codes=24, dim=4),
    FSQuantizerConfig(levels=[4, 3, 2]),
    LFQuantizerConfig(bits=4),
    BSQuantizerConfig(bits=4),
    IndexQuantizerConfig(codes=24, dim=4),
    SimVQConfig(codes=24, dim=4),
    ProductQuantizerConfig(codes=24, dim=4, tables=2),
    ResidualQuantizerConfig(codes=24, dim=4, depth=3, initial="random"),
    MultiScaleConfig(codes=24, dim=4, scales=SCALES),
]


def test_every_variant_is_tried_here() -> None:
    assert {config.name for config in CONFIGS} == VARIANTS.keys()


@pytest.mark.parametrize("quantizer", CONFIGS, ids=lambda config: config.name)
def test_from_images_to_samples(
    quantizer: QuantizerConfig, code_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    tokenized(tmp_path, quantizer)
    vqgan = VQGAN.from_pretrained(tmp_path / "v")
    dataset = CodeDataset.open(str(tmp_path / "codes"))
    stored = dataset.samples(range(SAMPLES), ())["codes"]
    assert stored.shape == (SAMPLES, *vqgan.config.code_shape(8, 8))
    assert len(stored.unique()) > 1

    scheme = NextScale(SCALES) if quantizer.name == "multiscale" else "next_index"
    recipe, _, before, after = learned(tmp_path, vqgan, scheme, code_recipe)
    assert after < before
    recipe.export().write(tmp_path / "t")

    generator = Generator(Transformer.from_pretrained(tmp_path / "t"), vqgan)
    drawn = generator.sample(3, seed=1, batch=2)
    assert drawn.codes.shape == (3, *dataset.grid)
    torch.testing.assert_close(drawn.images, vqgan.decode_codes(drawn.codes).clamp(-1, 1))
    assert torch.equal(generator.sample(1, seed=1).codes, drawn.codes[:1])
