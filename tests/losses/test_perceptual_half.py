"""LPIPS in fp16 against LPIPS in fp32, on small random networks."""

import pytest
import torch
from torch import Tensor

from taming_dist.losses.perceptual_half import HalfLPIPS
from tests.losses.test_perceptual import images, small_lpips


def gradient(distance: Tensor, y: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(distance.mean(), y)
    return found


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (8, 3), (2, 1)])
def test_distance_and_gradient_are_those_of_fp32_but_for_rounding(
    count: int, channels: int
) -> None:
    lpips, x = small_lpips(), images(count, channels)
    y = (x + 0.1 * images(count, channels, seed=2)).requires_grad_()
    exact, half = lpips(x, y), HalfLPIPS(lpips)(x, y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=2e-3, atol=1e-6)
    expected, found = gradient(exact, y), gradient(half, y)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_gradients_too_small_for_fp16_are_scaled_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mean over many pixels: here the distance is divided by what a larger batch would bring."""
    lpips, x = small_lpips(), images()
    y = (x + 0.1 * images(seed=2)).requires_grad_()
    pixels = 2 * 16 * 16
    monkeypatch.setattr("taming_dist.losses.perceptual_half.PIXELS_PER_SCALE", 16 / 2**16)
    expected = gradient(lpips(x, y), y) / 2**16
    scaled = gradient(HalfLPIPS(lpips)(x, y) / 2**16, y)
    assert (scaled - expected).norm() < 0.03 * expected.norm()
    monkeypatch.setattr("taming_dist.losses.perceptual_half.PIXELS_PER_SCALE", pixels)  # by 1
    unscaled = gradient(HalfLPIPS(lpips)(x, y) / 2**16, y)
    assert (unscaled - expected).norm() > 0.1 * expected.norm()


def test_the_exact_network_stays_as_it_is() -> None:
    lpips = small_lpips()
    before = {name: tensor.clone() for name, tensor in lpips.state_dict().items()}
    half = HalfLPIPS(lpips)
    assert {p.dtype for p in half.slices.parameters()} == {torch.float16}
    for name, tensor in lpips.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
