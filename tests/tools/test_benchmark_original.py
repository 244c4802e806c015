"""The baseline of the benchmarks computes what our models compute, so that speeds compare."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.start import init_world, shutdown
from taming_dist.launch import environment_place
from taming_dist.losses.terms import L1Config, PerceptualConfig
from taming_dist.losses.tokens import token_nll
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.modalities import RGB
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.quantizers.interface import nearest
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import OptimConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks import original  # noqa: E402

SIZE, BATCH, STEPS = 32, 2, 3


def vqgan_config() -> VQGANConfig:
    """A small one that has every kind of layer: attention inside a level, a change of width."""
    quantizer = VectorQuantizerConfig(codes=64, dim=8, legacy=True)
    return VQGANConfig(
        quantizer, SIZE, 32, [1, 2], blocks=1, attention_resolutions=[16], latent_channels=16
    )


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1


@torch.no_grad()
def test_it_encodes_and_decodes_as_ours(images: Tensor) -> None:
    torch.manual_seed(0)
    ours = VQGAN(vqgan_config()).eval()
    baseline = original.VQGAN(ours).eval()
    latents = baseline.quant_conv(baseline.encoder(images))
    torch.testing.assert_close(latents, ours.latents(images), atol=1e-5, rtol=1e-5)
    codes = ours.encode(images)
    assert baseline.encode(images).equal(codes)
    assert codes.unique().numel() > 1
    decoded = ours.decode_codes(codes)
    torch.testing.assert_close(baseline.decode_codes(codes), decoded, atol=1e-5, rtol=1e-5)
    reconstructed, loss = baseline(images)
    torch.testing.assert_close(reconstructed, ours(images).images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, ours(images).codebook_loss)


def test_it_finds_the_codes_that_ours_finds() -> None:
    torch.manual_seed(0)
    z, entries = torch.randn(500, 16), torch.randn(300, 16)
    assert original.nearest(z, entries).equal(nearest(z, entries))


def test_its_steps_with_the_gan_are_ours_in_its_order(images: Tensor) -> None:
    """Losses, adaptive weight and, through the second and third step, what Adam made of them."""
    world = init_world(environment_place())
    try:
        terms = {"l1": L1Config(), "perceptual": PerceptualConfig(weights="random")}
        loss = VQGANLossConfig(
            terms,
            discriminator=PatchGANConfig(channels=8, layers=2),
            disc_start=0,
            adaptive="per_rank",
            order="updated",
        )
        context = Context(OptimConfig(lr=1e-4), EngineConfig(), world, BATCH)
        recipe = VQGANRecipe(vqgan_config(), loss, context)
        assert recipe.lpips is not None
        baseline = original.Stage1(
            original.VQGAN(recipe.generator.module),
            original.patchgan(recipe.engines["discriminator"].module, channels=8, layers=2),
            original.LPIPS(recipe.lpips),
            lr=1e-4,
        )
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        batch = SimpleNamespace(columns={"image": pixels})
        clock = Clock(BATCH, STEPS)
        x = RGB().tensor(pixels)
        for _ in range(STEPS):
            (found,) = recipe.train_step([batch], clock)
            clock.tick()
            expected = baseline.step(x)
            for name in ("rec", "codebook", "gan_g", "gan_d", "adaptive_weight"):
                ours, theirs = found[name].item(), expected[name].item()
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
    finally:
        shutdown()


def test_its_transformer_learns_as_ours() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(
        32, [4, 4], layers=2, heads=4, width=32, condition=CodesCondition(32, [2, 4])
    )
    ours = Transformer(config)
    baseline = original.Stage2(original.GPT(ours), lr=1e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(decay_groups(ours, 0.1), lr=1e-3, betas=(0.9, 0.95))
    condition, codes = torch.randint(32, (BATCH, 8)), torch.randint(32, (BATCH, 16))
    for _ in range(STEPS):
        loss = token_nll(ours(codes, Prefix((condition,))), codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(baseline.step(condition, codes), loss, atol=1e-5, rtol=1e-5)
    assert loss < 3.4  # it learns: log 32 is 3.466


@torch.no_grad()
def test_its_samplers_read_what_its_passes_read() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(
        128, [2, 4], layers=2, heads=4, width=32, condition=CodesCondition(128, [2, 2])
    )
    gpt = original.GPT(Transformer(config))
    ids = torch.randint(128, (BATCH, 4))
    torch.manual_seed(5)
    found = gpt.sample_with_past(ids, 3)
    torch.manual_seed(5)
    read = ids
    for _ in range(3):
        read = torch.cat([read, gpt.next(read)], dim=1)
    assert found.equal(read[:, 4:])
