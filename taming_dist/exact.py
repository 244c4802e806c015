"""Around autocast: what is computed in fp32 whatever it says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context with autocast off for tensors of the device; the meta device, on which
    operations are only counted, has none that could be on."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
