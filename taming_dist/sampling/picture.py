"""A finished picture, on its way from a plan to a writer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """Picture number `index` of a run, `height` x `width` pixels.

    `strips`: uint8 [3, rows, width] each, from top to bottom, on the CPU; they are consumed once,
    before the next picture is asked for, so that a large picture need never be in memory as a
    whole. `facts`: what samples.json and the picture itself say of it, beside the recipe of the run
    (JSON-safe), such as its class.
    """

    index: int
    height: int
    width: int
    strips: Iterable[Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def whole(cls, index: int, pixels: Tensor, facts: Mapping[str, Any]) -> "Picture":
        """A picture uint8 [3, h, w] that is in memory."""
        return cls(index, pixels.shape[1], pixels.shape[2], (pixels,), facts)

    def pixels(self) -> Tensor:
        """All of it at once, uint8 [3, h, w]."""
        strips = list(self.strips)
        return strips[0] if len(strips) == 1 else torch.cat(strips, 1)
