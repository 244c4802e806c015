"""Between the CPU's memory and a GPU's without waiting for the GPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device: every tensor of a training step goes this way.

    A GPU fetches pinned memory while the host continues; for any other the host would wait until
    all that the GPU was given before is done. The pinned copy is dropped here: torch gives its
    memory out again once the GPU has fetched it. What is on the device already stays as it is.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor, of a dtype that numpy knows, in pinned memory."""
    copy = torch.empty_like(tensor, pin_memory=True)
    # by numpy, in this thread: torch's own copy would first wake up others and find free cores
    np.copyto(copy.numpy(), tensor.numpy())
    return copy


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU's memory. What is returned gives the copy: the host then
    waits for all that the device had been given up to here, and for nothing later."""
    if tensor.device.type != "cuda":
        copy = tensor.clone()
        return lambda: copy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def arrived() -> Tensor:
        done.synchronize()
        return copy

    return arrived
