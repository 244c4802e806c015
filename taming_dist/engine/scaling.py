"""Loss scaling for fp16, whose gradients would vanish below 6e-8: arXiv 1710.03740, section 3.2.

DeepSpeed's own scaler is not used: next to autocast it clips the scaled gradient, lets each rank of
ZeRO-3 judge its own shard alone, and never comes down from a factor that overflows at ZeRO 1 and 2.
"""

from typing import Any

import torch
from torch import Tensor

LARGEST, SMALLEST = 2.0**24, 1.0
FIRST = 2.0**16
CALM_STEPS = 2_000  # optimizer steps without an overflow, after which the factor doubles


class LossScale:
    """The factor before one engine's losses: halved by an overflow, doubled after a calm.

    `value`, fp32, and the steps of the present calm are scalars on the device: the host does not
    wait to learn of an overflow.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST, device=device)
        self._calm = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, moved: Tensor) -> None:
        """Take in whether the optimizer moved the weights; else a gradient was not finite, on some
        rank."""
        calm = (self._calm + 1) * moved
        grown = calm == CALM_STEPS
        kept = torch.where(grown, (self.value * 2).clamp(max=LARGEST), self.value)
        self.value = torch.where(moved, kept, (self.value / 2).clamp(min=SMALLEST))
        self._calm = calm * ~grown

    def state_dict(self) -> dict[str, Any]:
        return {"value": float(self.value), "calm": int(self._calm)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.fill_(state["value"])
        self._calm.fill_(state["calm"])
