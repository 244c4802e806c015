"""The GAN losses, what steadies them, and the adaptive weight against closed forms."""

import math

import pytest
import torch
from torch import nn

from taming_dist.losses.adversarial import (
    GAN_LOSSES,
    Hinge,
    NonSaturating,
    Vanilla,
    adaptive_weight,
    gradient_penalty,
    lecam,
)

REAL, FAKE = [2.0, 0.5, -1.0], [-3.0, 0.0, 1.0]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_hinge_losses_equal_their_formulas() -> None:
    expected = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    found = Hinge().discriminator(torch.tensor(REAL), torch.tensor(FAKE))
    assert found.item() == pytest.approx(expected)
    assert Hinge().generator(torch.tensor(FAKE)).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("loss", [Vanilla(), NonSaturating()])
def test_the_cross_entropy_of_d_equals_its_formula(loss: Vanilla) -> None:
    on_real = mean([-math.log(logistic(x)) for x in REAL])
    on_fake = mean([-math.log(1 - logistic(x)) for x in FAKE])
    found = loss.discriminator(torch.tensor(REAL), torch.tensor(FAKE))
    assert found.item() == pytest.approx((on_real + on_fake) / 2)


def test_the_generators_losses_equal_their_formulas() -> None:
    fake = torch.tensor(FAKE)
    assert Vanilla().generator(fake).item() == pytest.approx(-mean(FAKE))
    expected = mean([-math.log(logistic(x)) for x in FAKE])
    assert NonSaturating().generator(fake).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_gradients_push_logits_to_their_side(name: str) -> None:
    """Cross-entropy with logits and targets swapped has the right sign nowhere: its gradient does
    not even depend on the logit."""
    loss = GAN_LOSSES[name]
    real, fake = torch.tensor([0.3, -0.4]), torch.tensor([0.3, -0.4])
    real.requires_grad_(True)
    fake.requires_grad_(True)
    on_real, on_fake = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    assert (on_real < 0).all()
    assert (on_fake > 0).all()
    (on_fake,) = torch.autograd.grad(loss.generator(fake), fake)
    assert (on_fake < 0).all()


def test_cross_entropy_gradients_are_the_misplaced_probability() -> None:
    real, fake = torch.tensor([0.3], requires_grad=True), torch.tensor([0.7], requires_grad=True)
    NonSaturating().discriminator(real, fake).backward()
    assert real.grad.item() == pytest.approx(-0.5 * (1 - logistic(0.3)))
    assert fake.grad.item() == pytest.approx(0.5 * logistic(0.7))
    (found,) = torch.autograd.grad(NonSaturating().generator(fake), fake)
    assert found.item() == pytest.approx(-(1 - logistic(0.7)))


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_losses_are_finite_and_fp32_for_extreme_half_precision_logits(name: str) -> None:
    logits = torch.tensor([-3e4, 3e4], dtype=torch.bfloat16)
    for loss in (
        GAN_LOSSES[name].generator(logits),
        GAN_LOSSES[name].discriminator(logits, logits),
    ):
        assert loss.dtype == torch.float32
        assert loss.isfinite()


def test_hinge_gradients_vanish_beyond_the_margin() -> None:
    real = torch.tensor([2.0, 0.5], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5], requires_grad=True)
    Hinge().discriminator(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


def test_the_gradient_penalty_of_a_linear_judge_is_half_its_squared_weights() -> None:
    judge = nn.Linear(12, 1)
    images = torch.randn(5, 3, 2, 2, requires_grad=True)
    found = gradient_penalty(judge(images.flatten(1)), images)
    assert found.item() == pytest.approx(0.5 * judge.weight.square().sum().item(), rel=1e-5)
    found.backward()
    torch.testing.assert_close(judge.weight.grad, judge.weight.detach())


def test_the_gradient_penalty_judges_an_image_of_many_logits_by_their_mean() -> None:
    images = torch.randn(5, 1, 4, 4, requires_grad=True)
    # d mean / d x = 3 / 16 everywhere
    assert gradient_penalty(3 * images, images).item() == pytest.approx(16 * (3 / 16) ** 2 / 2)


def test_lecam_equals_its_formula_and_is_zero_beyond_the_averages() -> None:
    averages = torch.tensor([1.0, -0.5])
    found = lecam(torch.tensor(REAL), torch.tensor(FAKE), averages).item()
    above = mean([max(0, x + 0.5) ** 2 for x in REAL])
    below = mean([max(0, 1 - x) ** 2 for x in FAKE])
    assert found == pytest.approx(above + below)
    assert lecam(torch.tensor([-1.0]), torch.tensor([1.5]), averages).item() == 0


def test_the_adaptive_weight_is_the_ratio_of_norms() -> None:
    rec, gan = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(rec, gan).item() == pytest.approx(5 / (2 + 1e-4))


def test_the_adaptive_weight_is_clamped_where_the_gan_gives_no_gradient() -> None:
    zero = torch.zeros(3)
    assert adaptive_weight(torch.full((3,), 10.0), zero).item() == 1e4
    assert adaptive_weight(zero, zero).item() == 0
    assert adaptive_weight(zero, zero, smallest=0.015).item() == pytest.approx(0.015)
    assert adaptive_weight(torch.ones(3), zero, largest=7.0).item() == 7


def test_no_gradient_flows_through_the_adaptive_weight() -> None:
    rec = torch.ones(3, requires_grad=True)
    assert not adaptive_weight(rec, torch.ones(3)).requires_grad
