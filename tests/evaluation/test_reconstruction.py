"""Figures of reconstructions against their definitions, and their sums over ranks."""

import math

import pytest
import torch
from torch import Tensor, nn

from taming_dist.evaluation.reconstruction import ReconstructionMetrics
from taming_dist.evaluation.ssim import ssim
from taming_dist.losses.perceptual import LPIPS

Batch = tuple[Tensor, Tensor, Tensor]


def small_lpips() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS([nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())], [torch.rand(8)])


def batch(count: int, noise: float, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    reconstructions = images + noise * torch.randn(images.shape, generator=generator)
    return images, reconstructions, torch.randint(0, 5, (count, 2, 2), generator=generator)


BATCHES = [batch(4, 0.1, seed=0), batch(3, 0.6, seed=1), batch(1, 0.0, seed=2)]


def whole() -> Batch:
    images, reconstructions, codes = (torch.cat(part) for part in zip(*BATCHES, strict=True))
    return images, reconstructions, codes


def test_figures_are_those_of_the_whole_set_whatever_the_batches() -> None:
    lpips = small_lpips()
    figures = ReconstructionMetrics(8, lpips)
    for part in BATCHES:
        figures.update(*part)
    found = figures.compute()

    images, reconstructions, codes = whole()
    seen = (reconstructions.clamp(-1, 1) + 1) / 2
    error = float(((images + 1) / 2 - seen).square().double().mean())
    mean = images.mean((2, 3), keepdim=True)
    mean_error = float((images / 2 - mean / 2).square().double().mean())
    frequencies = codes.flatten().bincount().double() / codes.numel()
    expected = {
        "val_psnr": 10 * math.log10(1 / error),
        "val_lpips": float(lpips(images, reconstructions.clamp(-1, 1)).mean()),
        "val_psnr_mean_colour": 10 * math.log10(1 / mean_error),
        "val_lpips_mean_colour": float(lpips(images, mean.expand_as(images)).mean()),
        "codebook_usage": 5 / 8,
        "codebook_perplexity": float(torch.exp(-(frequencies * frequencies.log()).sum())),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_sums_of_ranks_add_up_to_one_process() -> None:
    alone, ranks = ReconstructionMetrics(8), [ReconstructionMetrics(8) for _ in range(2)]
    for position, part in enumerate(BATCHES):
        alone.update(*part)
        ranks[position % 2].update(*part)
    ranks[0].sums += ranks[1].sums
    assert ranks[0].compute() == pytest.approx(alone.compute(), rel=1e-12)


def test_reference_features_are_computed_once_for_both_predictions() -> None:
    lpips, passes = small_lpips(), []
    lpips.slices[0].register_forward_hook(lambda *_: passes.append(1))
    ReconstructionMetrics(8, lpips).update(*BATCHES[0])
    assert len(passes) == 3


def test_without_network_or_floor_their_figures_are_left_out() -> None:
    figures = ReconstructionMetrics(8, mean_colour=False)
    figures.update(*BATCHES[0])
    assert set(figures.compute()) == {"val_psnr", "codebook_usage", "codebook_perplexity"}


def test_a_perfect_reconstruction_is_infinitely_good() -> None:
    images, _, codes = BATCHES[0]
    figures = ReconstructionMetrics(8)
    figures.update(images, images, codes)
    assert figures.compute()["val_psnr"] == math.inf


def test_each_network_has_its_own_figure_and_similarity_is_asked_for() -> None:
    networks = {"lpips": small_lpips(), "lpips_alex": small_lpips()}
    networks["lpips_alex"].heads[0].mul_(2)
    figures = ReconstructionMetrics(8, networks, mean_colour=False, ssim=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 12, 12, generator=generator) * 2 - 1
    made = torch.rand(2, 3, 12, 12, generator=generator) * 2 - 1
    for part in (slice(0, 1), slice(1, 2)):
        figures.update(images[part], made[part], torch.zeros(1, 2, 2, dtype=torch.int64))
    found = figures.compute()
    assert found["val_lpips_alex"] == pytest.approx(2 * found["val_lpips"])
    similar = ssim((images + 1) / 2, (made + 1) / 2)
    assert found["val_ssim"] == pytest.approx(float(similar.mean()))
