"""Around autocast: what is computed in fp32 whatever it says, and what it would cast twice."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context with autocast off for tensors of the device; the meta device, on which
    operations are only counted, has none that could be on."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def cast_once(x: Tensor) -> Tensor:
    """Return x in autocast's precision if that is on: autocast casts what several layers read once
    for each of them, and its gradients as often."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
