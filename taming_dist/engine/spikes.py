"""Spikes of a gradient's norm, known on the device: by the mean and spread of the norms before.

A norm that stands out by more than so many standard deviations is a spike, whose step is skipped.
In the statistics it counts as the largest that would have been none, so that one of them hardly
widens what comes after it. Many in a row are no spikes: the norms have risen for good.
"""

from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # norms; none is a spike before so many are known
MOST_IN_A_ROW = 10  # after so many the next is followed, and the norms are learned anew


class Spikes:
    """The last norms of an engine's gradients; all tensors stay on the device.

    `deviations`: by how many a spike stands out; 0: nothing is one.
    """

    def __init__(self, deviations: float, device: torch.device) -> None:
        self._deviations = deviations
        self._norms = torch.zeros(WINDOW, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros_like(self._count)
        self._places = torch.arange(WINDOW, device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """Take in the norm of a gradient, which may be none that is finite; gives whether its step
        is to be made, a flag."""
        finite = norm.isfinite()
        if not self._deviations:
            return finite
        spread, mean = torch.std_mean(self._norms)
        most = torch.where(self._count < WINDOW, torch.inf, mean + self._deviations * spread)
        here = finite & (self._places == self._count % WINDOW)
        self._norms = torch.where(here, torch.minimum(norm, most), self._norms)
        stands_out = finite & (norm > most)
        in_a_row = (self._in_a_row + stands_out) * (stands_out | ~finite)
        risen = in_a_row > MOST_IN_A_ROW
        self._in_a_row = in_a_row * ~risen
        self._count = (self._count + finite) * ~risen
        return finite & (~stands_out | risen)

    def state_dict(self) -> dict[str, Any]:
        """The norms, as plain JSON; empty where nothing is a spike."""
        if not self._deviations:
            return {}
        numbers = {"count": int(self._count), "in_a_row": int(self._in_a_row)}
        return {"norms": self._norms.tolist()} | numbers

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """That of a run without any, {}, changes nothing."""
        if self._deviations and state:
            self._norms.copy_(torch.tensor(state["norms"]))
            self._count.fill_(state["count"])
            self._in_a_row.fill_(state["in_a_row"])
