"""What goes to the GPU is pinned, and not waited for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taming_dist.copies import pinned, to_device

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda images: images.movedim(3, 1),
    "every second row": lambda images: images[1::2],
    "one row for all": lambda images: images[:1].expand(4, -1, -1, -1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_gpu_is_given_the_values_without_being_waited_for(
    layout: Callable[[Tensor], Tensor],
) -> None:
    given = layout(torch.arange(4 * 6 * 5 * 3).view(4, 6, 5, 3))
    to_device(given, torch.device("cuda"))  # CUDA starts
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(given, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pinned(given).is_pinned()
    assert there.cpu().equal(given)
