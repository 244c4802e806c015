"""Which validation was the best, and how many have followed it without a better one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from taming_dist.errors import UserError


@dataclasses.dataclass(frozen=True)
class Criterion:
    """By which metric of the validation set models are compared, such as val/nll or eval/fid, and
    whether `higher` is better."""

    metric: str
    higher: bool = False

    @property
    def group(self) -> str:
        """By which measurement it is found, such as val."""
        return self.metric.partition("/")[0]

    @property
    def name(self) -> str:
        """That of the metric within its group, such as nll."""
        return self.metric.partition("/")[2]

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raise a UserError if its metric is not one of those that were found."""
        if self.name not in metrics:
            there = ", ".join(f"{self.group}/{each}" for each in metrics)
            raise UserError(f"train.best={self.metric}: this run's validation has only {there}")

    def of(self, metrics: Mapping[str, Any]) -> float:
        """The value of its metric; NaN where the log has left one out that was not finite."""
        return metrics.get(self.name, math.nan)

    def prefers(self, value: float, other: float) -> bool:
        """Whether a value is better than another; one that is not a number never is."""
        return math.isfinite(value) and (value > other if self.higher else value < other)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far: the `metric` had this `value` at `images` seen; None where there
    was none yet. `newest`: the images seen at the newest validation; `since`: how many have come
    after the best one."""

    metric: str = ""
    value: float | None = None
    images: int = 0
    newest: int = 0
    since: int = 0

    def after(self, criterion: Criterion, images: int, value: float) -> "Best":
        """What it is after a validation at `images` seen gave `value`."""
        if self.value is None or criterion.prefers(value, self.value):
            if not math.isfinite(value):
                return dataclasses.replace(self, newest=images)
            return Best(criterion.metric, value, images, images)
        return dataclasses.replace(self, newest=images, since=self.since + 1)

    def is_at(self, images: int) -> bool:
        """Whether the model that has seen so many images is the best."""
        return self.value is not None and self.images == images

    def state(self) -> dict[str, Any]:
        """It as plain JSON, of which `Best(**state)` makes it again."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.6g} after {self.images} images"
