"""What goes to the device keeps its values and layout, and is left alone if it is there already."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taming_dist import copies
from taming_dist.copies import fetch, pinned, to_device

CPU = torch.device("cpu")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda images: images.movedim(3, 1),
    "every second row": lambda images: images[1::2],
    "one row for all": lambda images: images[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_fetched_is_what_was_there_when_it_was_asked_for(device: str) -> None:
    there = torch.arange(4.0, device=device)
    arrived = fetch(there)
    there.zero_()
    assert arrived().tolist() == [0, 1, 2, 3]


def test_on_the_cpu_nothing_is_copied() -> None:
    here = torch.arange(4)
    assert to_device(here, CPU) is here


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_a_pinned_copy_has_the_values_and_as_a_batch_of_pixels_the_strides(
    monkeypatch: pytest.MonkeyPatch, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Without a GPU there is no pinned memory: the copy is made in plain memory here."""
    asked, plain = [], torch.empty_like

    def empty_like(tensor: Tensor, pin_memory: bool) -> Tensor:
        asked.append(pin_memory)
        return plain(tensor)

    monkeypatch.setattr(copies.torch, "empty_like", empty_like)
    given = layout(torch.arange(4 * 6 * 5 * 3).view(4, 6, 5, 3).to(dtype))
    copy = pinned(given)
    assert copy.equal(given)
    assert copy.data_ptr() != given.data_ptr()
    assert asked == [True]
    if layout is LAYOUTS["channels last"]:  # so that the GPU fetches it in one piece
        assert copy.stride() == given.stride()
