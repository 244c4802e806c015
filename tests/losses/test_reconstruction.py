"""The pixel losses against their closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taming_dist.losses.reconstruction import l1, l2

X = torch.tensor([[1.0, -1.0], [0.0, 0.5]])


def test_l1_is_the_mean_absolute_difference() -> None:
    assert l1(X, torch.zeros(2, 2)).item() == pytest.approx(2.5 / 4)


def test_l2_is_the_mean_squared_difference() -> None:
    assert l2(X, torch.zeros(2, 2)).item() == pytest.approx(2.25 / 4)


@pytest.mark.parametrize("loss", [l1, l2])
def test_half_precision_images_are_compared_in_fp32(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    found = loss(torch.full((1000,), 0.1, dtype=torch.bfloat16), torch.zeros(1000))
    assert found.dtype == torch.float32
    rounded = torch.tensor(0.1).bfloat16().float()
    assert found.item() == pytest.approx(loss(rounded, torch.zeros(())).item())
