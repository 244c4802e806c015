"""Constants of networks as tensors."""

from functools import cache

import torch
from jaxtyping import Num
from torch import Tensor


@cache
def constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Num[Tensor, "n"]:
    """A tensor of a few numbers, not to be written to, brought to a device once: a copy from the
    host in each forward pass would have it wait for all that the device was given to do."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
