"""3x3 convolutions with fewer multiplications: equal to torch's within fp32 rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from taming_dist.kernels import winograd


def plain(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool) -> Tensor:
    if doubled:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(x, weight, bias, padding=1)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the size of what is exact, in the mean."""
    return float(((found - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("images", "channels", "out", "height", "width", "doubled"),
    [
        (3, 16, 24, 8, 12, False),  # several images
        (1, 16, 24, 64, 48, False),  # several chunks of an image, the last one shorter
        (2, 24, 16, 6, 10, True),
        (2, 128, 160, 12, 20, False),
    ],
)
def test_values_and_gradients_are_those_of_torch_within_a_few_roundings(
    images: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    doubled: bool,
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(images, channels, height, width).contiguous(memory_format=layout)
    weight = torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5
    leaves = [leaf.requires_grad_(True) for leaf in (x, weight, torch.randn(out))]
    y = winograd.convolution(leaves[0], leaves[1], leaves[2], doubled)
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    expected = plain(exact[0], exact[1], exact[2], doubled)
    assert y.shape == expected.shape
    assert error(y, expected) < 3e-6
    dy = torch.randn(y.shape).contiguous(memory_format=layout)
    found = torch.autograd.grad(y, leaves, dy)
    for one, other in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert one.shape == other.shape
        assert error(one, other) < 4e-6


def test_it_gives_the_same_bits_at_every_run_and_without_gradients() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 64, 64), torch.randn(32, 32, 3, 3, requires_grad=True)

    def made() -> tuple[Tensor, Tensor]:
        y = winograd.convolution(x, weight, None)
        return y.detach(), torch.autograd.grad(y, weight, y.detach())[0]

    alone, before = made(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = made(), made()
        assert torch.get_num_threads() == 2
        with torch.inference_mode():
            inferred = winograd.convolution(x, weight, None)
    finally:
        torch.set_num_threads(before)
    for one, other, single in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, single, atol=1e-3, rtol=1e-4)
    assert torch.equal(inferred, first[0])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3, requires_grad=True)
    winograd.convolution(x, weight, None).sum().backward()
    expected = torch.nn.grad.conv2d_weight(x, weight.shape, torch.ones(1, 8, 8, 8), padding=1)
    torch.testing.assert_close(weight.grad, expected, atol=1e-4, rtol=1e-5)


def test_what_is_behind_it_may_write_into_its_output() -> None:
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    y = winograd.convolution(x, torch.randn(8, 8, 3, 3), None)
    nn.functional.relu(y, inplace=True).sum().backward()
    assert x.grad is not None


def test_it_is_for_many_channels_in_fp32_and_whole_tiles() -> None:
    weight, few = torch.zeros(128, 128, 3, 3), torch.zeros(128, 64, 3, 3)
    assert winograd.pays(torch.zeros(1, 128, 24, 24), weight)
    assert winograd.pays(torch.zeros(1, 128, 14, 14), weight, doubled=True)
    assert not winograd.pays(torch.zeros(8, 128, 26, 26), weight)  # 6.5 tiles across
    assert not winograd.pays(torch.zeros(8, 128, 16, 16), weight)  # too little work on each
    assert not winograd.pays(torch.zeros(2, 64, 24, 24), few)
    assert not winograd.pays(torch.zeros(2, 128, 24, 24).bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd.pays(torch.zeros(2, 128, 24, 24), weight)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not winograd.pays(torch.zeros(2, 128, 24, 24), weight)


def test_an_image_gets_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32, 12, 20), torch.randn(32, 32, 3, 3)
    together = winograd.convolution(x, weight, None)
    for number in range(5):
        alone = winograd.convolution(x[number : number + 1], weight, None)
        assert torch.equal(together[number : number + 1], alone)
