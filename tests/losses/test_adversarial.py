"""The GAN losses and the adaptive weight against closed forms."""

import pytest
import torch

from taming_dist.losses.adversarial import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
)


def test_hinge_losses_equal_their_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    expected = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert hinge_discriminator(real, fake).item() == pytest.approx(expected)
    assert hinge_generator(fake).item() == pytest.approx(2 / 3)


def test_hinge_gradients_vanish_beyond_the_margin() -> None:
    real = torch.tensor([2.0, 0.5], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5], requires_grad=True)
    hinge_discriminator(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


def test_the_adaptive_weight_is_the_ratio_of_norms() -> None:
    rec, gan = torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 2.0]])
    assert adaptive_weight(rec, gan).item() == pytest.approx(5 / (2 + 1e-4))


def test_the_adaptive_weight_is_clamped_where_the_gan_gives_no_gradient() -> None:
    zero = torch.zeros(3)
    assert adaptive_weight(torch.full((3,), 10.0), zero).item() == 1e4
    assert adaptive_weight(zero, zero).item() == 0


def test_no_gradient_flows_through_the_adaptive_weight() -> None:
    rec = torch.ones(3, requires_grad=True)
    assert not adaptive_weight(rec, torch.ones(3)).requires_grad
