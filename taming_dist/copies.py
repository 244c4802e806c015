"""From the CPU's memory to a GPU without waiting for it."""

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
