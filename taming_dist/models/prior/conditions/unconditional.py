"""No condition: one start token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.interface import Columns, Condition, Request

START_TOKEN = 0


@dataclass
class Unconditional(Condition):
    """One start token, the same for every image."""

    name: str = "none"
    has_table: ClassVar[bool] = False
    can_drop: ClassVar[bool] = False

    @property
    def length(self) -> int:
        return 1

    @property
    def vocabulary(self) -> int:
        return START_TOKEN + 1

    def part(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return `count` start tokens as prefix."""
        return torch.full((count, 1), START_TOKEN, dtype=torch.int64)

    def given(self, value: Any) -> Columns:
        raise UserError("class_id: this transformer is unconditional, leave the class out")

    def requested(self, request: Request) -> Columns:
        if request.class_id is not None:
            self.given(request.class_id)
        if request.condition is not None:
            raise UserError("condition: this transformer is unconditional, leave it out")
        return {}
