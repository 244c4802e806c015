"""The distance on the sphere, and the loss that is made of it."""

import math

import pytest
import torch

from taming_dist.guiding.objective import Objective, spherical_distance


@pytest.mark.parametrize("angle", [1e-3, 0.5, math.pi / 2, 3.0, math.pi])
def test_it_is_half_of_the_squared_angle_whatever_the_lengths(angle: float) -> None:
    one = torch.tensor([[3.0, 0.0]])
    other = 0.2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert spherical_distance(one, other).item() == pytest.approx(angle**2 / 2, rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_its_gradient_is_finite_at_the_same_and_at_opposite_vectors(sign: float) -> None:
    one = torch.tensor([[0.6, 0.8]], requires_grad=True)
    spherical_distance(one, sign * one.detach()).sum().backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()


def test_the_loss_is_the_weighted_mean_and_negative_weights_lead_away() -> None:
    axes, embeddings = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    objective = Objective.of(axes, [3.0, -1.0])
    right, half = math.pi**2 / 8, math.pi**2 / 32
    expected = 0.75 * (0 + half) / 2 - 0.25 * (right + half) / 2
    assert objective(embeddings).item() == pytest.approx(expected, rel=1e-5)
