"""Operations are counted as they are known: by formula for the transformer, by hand elsewhere."""

import sys
from pathlib import Path

import pytest

from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.stages.vqgan import VQGANLossConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks import flops  # noqa: E402


def test_a_transformers_step_takes_what_its_matrices_take() -> None:
    layers, width, vocabulary, tokens, batch = 3, 64, 128, 32, 2
    config = TransformerConfig(
        vocabulary, [4, 8], layers=layers, heads=4, width=width, condition=ClassCondition(10)
    )
    products = 6 * (12 * layers * width**2 + width * vocabulary) * batch * tokens
    attention = 12 * layers * width * tokens**2 * batch
    assert flops.prior_step(config, batch) == products + attention


def test_the_papers_vqgan_takes_what_was_counted_on_gpus() -> None:
    """138.6 and 252.7 GFLOP for an image, and about 1.34 TFLOP in a step with the GAN on."""
    config = VQGANConfig(VectorQuantizerConfig(codes=1024, dim=256))
    found = flops.encoding(config, 1, 256), flops.decoding(config, 1, 256)
    assert found == pytest.approx((138.6e9, 252.7e9), rel=1e-3)
    step = flops.vqgan_step(config, VQGANLossConfig(), 1, 256)
    assert step == pytest.approx(1.34e12, rel=5e-3)
    assert flops.vqgan_step(config, VQGANLossConfig(), 2, 256) == 2 * step
