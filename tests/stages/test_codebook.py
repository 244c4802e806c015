"""What the recipe does for quantizers: schedules, start, restarts, all micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from taming_dist.models.quantizers import (
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    VectorQuantizerConfig,
)
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.clock import Clock

Make = Callable[..., Any]


def step(recipe: VQGANRecipe, *batches: Any, at: int = 0, steps: int = 10) -> list[dict[str, Any]]:
    """The scalars of the micro-batches of one optimizer step."""
    size = 2 * len(batches)
    return list(recipe.train_step(batches, Clock(size, steps, images=at * size)))


def test_the_temperature_follows_the_images_seen_and_is_logged(recipe: Make, batch: Make) -> None:
    quantizer = GumbelQuantizerConfig(codes=24, dim=8, temperature=0.9, final_temperature=0.1)
    made = recipe({"quantizer": quantizer}, disc_start=99)
    found = []
    for at in (0, 5, 9, 5):
        step(made, batch(), at=at)
        found.append(made.window_metrics()["temperature"])
    assert found[:2] == pytest.approx([0.9, 0.5])
    assert found[0] > found[1] > found[2] > 0.1
    assert found[1] == found[3]  # a pure function of where the run is


def test_a_quantizer_without_a_schedule_logs_none(recipe: Make, batch: Make) -> None:
    made = recipe(disc_start=99)
    step(made, batch())
    assert "temperature" not in made.window_metrics()


def test_the_first_step_sets_the_codebook_from_all_micro_batches(recipe: Make, batch: Make) -> None:
    quantizer = VectorQuantizerConfig(codes=24, dim=8, initial="data")
    made = recipe({"quantizer": quantizer}, accumulation=2, lr=0.0, disc_start=99)
    batches = [batch(seed=0), batch(seed=1)]
    network = made.generator.module
    with torch.no_grad():
        pools = [network.latents(made.autoencoder.input(part)) for part in batches]
    step(made, *batches)
    pool = torch.cat(pools).permute(0, 2, 3, 1).flatten(0, 2)
    distances = torch.cdist(network.quantize.embedding.weight.detach(), pool)
    assert float(distances.min(1).values.max()) < 1e-3
    from_first = distances.argmin(1) < len(pool) // 2
    assert 0 < from_first.sum() < 24


def test_restarted_codes_are_counted_between_two_log_points(recipe: Make, batch: Make) -> None:
    quantizer = VectorQuantizerConfig(codes=24, dim=8, revive_below=0.9)
    made = recipe({"quantizer": quantizer}, disc_start=99)
    for at in range(5):
        step(made, batch(seed=at), at=at)
    assert made.window_metrics()["codebook_revived"] > 0
    assert made.window_metrics()["codebook_revived"] == 0


def test_a_loss_below_zero_is_fine_where_codes_are_to_be_diverse(recipe: Make, batch: Make) -> None:
    quantizer = IndexQuantizerConfig(codes=24, dim=8, entropy_weight=10.0, temperature=1.0)
    (scalars,) = step(recipe({"quantizer": quantizer}, disc_start=99), batch())
    expected = scalars["rec"] + scalars["codebook"]
    torch.testing.assert_close(scalars["loss"], expected)
