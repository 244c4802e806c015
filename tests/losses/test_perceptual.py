"""LPIPS against the lpips package, on small random networks."""

import pytest
import torch
from torch import Tensor, nn

from taming_dist.losses.perceptual import LPIPS


def small_lpips() -> LPIPS:
    torch.manual_seed(0)
    slices = [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)),
        nn.Sequential(nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 16, 3), nn.ReLU(inplace=True)),
    ]
    return LPIPS(slices, [torch.rand(8), torch.rand(16)])


def images(count: int = 2, channels: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, 16, 16, generator=generator) * 2 - 1


def by_the_formula(lpips: LPIPS, x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(len(x))
    x, y = (x - lpips.shift) / lpips.scale, (y - lpips.shift) / lpips.scale
    for part, head in zip(lpips.slices, lpips.heads, strict=True):
        x, y = part(x), part(y)
        u, v = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
        total += (head * (u - v) ** 2).sum(1).mean((1, 2))
    return total


def test_distance_is_the_formula_of_the_paper_for_each_image() -> None:
    lpips, x, y = small_lpips(), images(), images(seed=2)
    assert lpips(x, y).shape == (2,)
    torch.testing.assert_close(lpips(x, y), by_the_formula(lpips, x, y))
    torch.testing.assert_close(lpips(x, x), torch.zeros(2))


def test_reference_features_give_the_same_distance_and_gradient() -> None:
    lpips, x = small_lpips(), images()
    y = images(seed=2).requires_grad_()
    gradients = []
    for features in (None, lpips.features(x)):
        (gradient,) = torch.autograd.grad(lpips(x, y, features).sum(), y)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_no_features_are_computed_twice() -> None:
    lpips, calls = small_lpips(), []
    lpips.slices[0].register_forward_hook(lambda *_: calls.append(1))
    lpips(images(), images(seed=2))
    assert len(calls) == 2
    features = lpips.features(images())
    lpips(images(), images(seed=2), features)
    lpips(images(), images(seed=3), features)
    assert len(calls) == 5


def test_it_stays_in_eval_mode_and_frozen_inside_a_training_model() -> None:
    lpips = small_lpips()
    owner = nn.ModuleList([lpips]).train()
    assert owner.training
    assert not any(module.training for module in lpips.modules())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    x, y = images(), images(seed=2)
    torch.testing.assert_close(lpips(x, y), lpips(x, y), rtol=0, atol=0)


def test_gradient_at_zero_features_is_zero_where_the_plain_formula_gives_nan() -> None:
    lpips = LPIPS([nn.Conv2d(3, 8, 3, bias=False)], [torch.rand(8)])
    x, y = images(), lpips.shift.repeat(2, 1, 16, 16).requires_grad_()
    (plain,) = torch.autograd.grad(by_the_formula(lpips, x, y).sum(), y)
    assert plain.isnan().all()
    (ours,) = torch.autograd.grad(lpips(x, y).sum(), y)
    torch.testing.assert_close(ours, torch.zeros_like(ours))


def test_gradient_equals_the_plain_formula_elsewhere() -> None:
    lpips, x = small_lpips(), images()
    y = images(seed=2).requires_grad_()
    with torch.no_grad():
        for part in lpips.slices:
            part[-2].bias.fill_(0.5)  # no pixel is off in every channel
    (plain,) = torch.autograd.grad(by_the_formula(lpips, x, y).sum(), y)
    (ours,) = torch.autograd.grad(lpips(x, y).sum(), y)
    assert plain.isfinite().all()
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs_do_not_change_its_precision(dtype: torch.dtype) -> None:
    lpips, x, y = small_lpips(), images().to(dtype), images(seed=2).to(dtype)
    expected = lpips(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = lpips(x, y, lpips.features(x))
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=0, atol=0)


def test_one_channel_is_broadcast_to_three() -> None:
    lpips, x, y = small_lpips(), images(channels=1), images(channels=1, seed=2)
    torch.testing.assert_close(lpips(x, y), lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
