"""The pixel loss against its closed form."""

import pytest
import torch

from taming_dist.losses.reconstruction import l1


def test_l1_is_the_mean_absolute_difference() -> None:
    x = torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    assert l1(x, torch.zeros(2, 2)).item() == pytest.approx(2.5 / 4)


def test_l1_of_half_precision_images_is_taken_in_fp32() -> None:
    loss = l1(torch.full((1000,), 0.1, dtype=torch.bfloat16), torch.zeros(1000))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.tensor(0.1).bfloat16().item())
