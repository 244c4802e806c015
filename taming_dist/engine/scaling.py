"""Loss scaling for fp16, whose gradients would vanish below 6e-8: arXiv 1710.03740, section 3.2.

DeepSpeed's own scaler is not used: next to autocast it clips the scaled gradient, lets each rank of
ZeRO-3 judge its own shard alone, and never comes down from a factor that overflows at ZeRO 1 and 2.
"""

from typing import Any

LARGEST, SMALLEST = 2.0**24, 1.0
FIRST = 2.0**16
CALM_STEPS = 2_000  # optimizer steps without an overflow, after which the factor doubles


class LossScale:
    """The factor before one engine's losses: halved by an overflow, doubled after a calm."""

    def __init__(self) -> None:
        self.value = FIRST
        self._calm = 0

    def update(self, overflowed: bool) -> None:
        """Take in whether the gradient of an optimizer step was not finite, on any rank."""
        if overflowed:
            self.value, self._calm = max(self.value / 2, SMALLEST), 0
            return
        self._calm += 1
        if self._calm == CALM_STEPS:
            self.value, self._calm = min(self.value * 2, LARGEST), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "calm": self._calm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._calm = state["value"], state["calm"]
