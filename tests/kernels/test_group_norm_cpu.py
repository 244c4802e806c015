"""GroupNorm's gradient on the CPU: that of the formula, within the rounding of the dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from taming_dist.kernels import group_norm_cpu
from taming_dist.models.convolution import GroupNorm
from taming_dist.models.quick import run_plainly

GROUPS, EPSILON = 8, 1e-6


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(True)


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("shape", [(2, 16, 12, 20), (3, 24, 5, 7), (1, 8, 4, 4), (2, 64, 1, 3)])
def test_values_are_torchs_and_gradients_those_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, rounding: float
) -> None:
    torch.manual_seed(0)
    x = images(shape, dtype)
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    y = group_norm_cpu.group_norm(x, weight, bias, GROUPS, EPSILON)
    assert torch.equal(y, F.group_norm(x, GROUPS, weight, bias, EPSILON))
    dy = torch.randn_like(y)
    exact = [leaf.detach().double().requires_grad_(True) for leaf in (x, weight, bias)]
    expected = F.group_norm(exact[0], GROUPS, exact[1], exact[2], EPSILON)
    found = torch.autograd.grad(y, (x, weight, bias), dy)
    for one, other in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert one.shape == other.shape
        assert error(one, other) < rounding
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1].dtype == found[2].dtype == torch.float32


def test_gradients_of_an_image_do_not_depend_on_those_beside_it() -> None:
    torch.manual_seed(0)
    x, weight, bias = images((3, 16, 8, 8)), torch.randn(16), torch.randn(16)
    dy = torch.randn_like(x)
    alone = []
    for each in range(3):
        part = x.detach()[each : each + 1].requires_grad_(True)
        y = group_norm_cpu.group_norm(part, weight, bias, GROUPS, EPSILON)
        alone += torch.autograd.grad(y, part, dy[each : each + 1])
    y = group_norm_cpu.group_norm(x, weight, bias, GROUPS, EPSILON)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.cat(alone))


def test_a_layer_takes_it_for_large_images_in_channels_last_and_only_where_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    monkeypatch.setattr(
        group_norm_cpu,
        "group_norm",
        lambda x, weight, bias, groups, epsilon: taken.append(x) or F.group_norm(x, groups),
    )
    large, layer = images((1, 16, 128, 128)), GroupNorm(8, 16)
    layer(large)
    assert len(taken) == 1
    with torch.no_grad():
        layer(large)
    layer(large.detach())
    layer(large.detach().contiguous().requires_grad_(True))
    layer(images((1, 16, 64, 64)))
    plain = large.detach()
    with FakeTensorMode() as mode:
        GroupNorm(8, 16)(mode.from_tensor(plain).requires_grad_(True))
    run_plainly(layer)
    layer(large)
    assert len(taken) == 1


def test_a_second_derivative_is_refused() -> None:
    x = images((1, 16, 8, 8))
    y = group_norm_cpu.group_norm(x, torch.ones(16), torch.zeros(16), GROUPS, EPSILON)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
