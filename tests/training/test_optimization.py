"""Learning rates against slow formulas; seeds that never meet."""

import math

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import OptimConfig, mix, seed_step


def rate(config: OptimConfig, images: int, batch: int = 10, steps: int = 100) -> float:
    return config.learning_rate(Clock(batch, steps, images=images))


def test_the_base_rate_is_per_image_of_the_global_batch() -> None:
    assert rate(OptimConfig(base_lr=4.5e-6), 0, batch=12) == pytest.approx(5.4e-5)
    assert rate(OptimConfig(lr=3e-4), 0, batch=12) == 3e-4


def test_warm_up_is_a_straight_line_in_images_that_never_starts_at_zero() -> None:
    config = OptimConfig(lr=1.0, warmup_images=99)
    assert [rate(config, images) for images in (0, 49, 98)] == [0.01, 0.5, 0.99]
    assert rate(config, 99) == 1.0
    assert rate(config, 900) == 1.0


def test_cosine_falls_from_the_peak_to_the_final_share() -> None:
    config = OptimConfig(lr=2.0, schedule="cosine", warmup_images=200, final=0.1)
    for images in (200, 350, 600, 999):
        progress = (images - 200) / 800
        expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        assert rate(config, images) == pytest.approx(expected)
    assert rate(config, 1000) == pytest.approx(0.2)
    assert rate(config, 5000) == pytest.approx(0.2)  # and does not rise again


def test_the_schedule_knows_images_only_so_the_batch_does_not_move_it() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine")
    small, large = rate(config, 400, batch=4, steps=250), rate(config, 400, batch=20, steps=50)
    assert small == large


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1.0, "name": "sgd"}, r"optim\.name=sgd: use adam or adamw"),
        ({"lr": 1.0, "schedule": "linear"}, r"optim\.schedule=linear: use constant or cosine"),
        ({}, r"exactly one of optim\.lr .* and optim\.base_lr"),
        ({"lr": 1.0, "base_lr": 1.0}, r"exactly one of optim\.lr .* and optim\.base_lr"),
    ],
)
def test_settings_that_make_no_sense_are_the_users_mistake(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**values)


def test_mixed_seeds_differ_for_every_seed_step_and_rank_and_suit_torch() -> None:
    seeds = {
        mix(seed, images, rank)
        for seed in range(10)
        for images in range(0, 800, 8)
        for rank in range(10)
    }
    assert len(seeds) == 10 * 100 * 10
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in sorted(seeds)])
    assert ((bits.double().mean(0) - 0.5).abs() < 0.03).all()


def test_the_order_and_the_number_of_parts_matter() -> None:
    assert len({mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(1), mix(0, 1, 2)}) == 5


def test_mix_is_splitmix64() -> None:
    # the first output of the published generator from state 1234567
    assert mix(1234567) == 6457827717110365317 >> 1


def test_a_step_draws_the_same_noise_whenever_it_is_reached() -> None:
    draws = []
    for images, rank in ((8, 0), (8, 0), (8, 1), (16, 0)):
        seed_step(5, Clock(8, 10, images=images), rank)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
