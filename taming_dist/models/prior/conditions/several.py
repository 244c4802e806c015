"""Several conditions at once, one after the other in a stated order."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.choice import chosen
from taming_dist.models.prior.conditions.interface import Codes, Columns, Condition, Request
from taming_dist.models.prior.orders import Grid
from taming_dist.models.prior.window import Window


@dataclass
class SeveralConditions(Condition):
    """The prefixes of several conditions in the order of `of`, each with a table of its own.

    `of` has the names of conditions, or their keys with a `name`: [class, codes], or
    [class, {name: objects, categories: 80}]. The null prefix leaves out all of them.
    """

    of: list[Any] = dataclasses.field(default_factory=list)
    name: str = "several"

    def __post_init__(self) -> None:
        from taming_dist.models.prior.conditions import CONDITIONS  # which has this class too

        members = {
            name: member
            for name, member in CONDITIONS.items()
            if member.can_drop and member is not SeveralConditions
        }
        self.of = [chosen(members, value, "model.condition.of") for value in self.of]
        for value in self.of:
            if not isinstance(value, Condition):
                raise UserError(f"model.condition.of={value}: use names of {', '.join(members)}")
        names = [each.name for each in self.of]
        if len(set(names)) < len(names):
            raise UserError(f"model.condition.of={names}: name each condition once")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(self.of)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for each in self.of for column in each.columns))

    @property
    def length(self) -> int:
        return sum(each.length for each in self.of)

    @property
    def vocabulary(self) -> int:
        """Tokens of the one that has most of them."""
        return max(each.vocabulary for each in self.of)

    def part(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        raise NotImplementedError("several conditions have a part each")

    def enlarged(self, window: Grid, image: Grid) -> "SeveralConditions":
        return dataclasses.replace(self, of=[each.enlarged(window, image) for each in self.of])

    def window(self, count: int, columns: Columns, window: Window) -> Columns:
        found, changed = dict(columns), False
        for each in self.of:
            cut = each.window(count, columns, window)
            changed = changed or cut is not columns
            found |= {name: value for name, value in cut.items() if value is not columns.get(name)}
        return found if changed else columns

    def draw(self, count: int, generator: torch.Generator) -> Columns:
        found: dict[str, Tensor] = {}
        for each in self.of:
            found |= each.draw(count, generator)
        return found

    def check(self) -> None:
        if not self.of:
            raise UserError("model.condition.of=[]: name the conditions, such as [class, codes]")
        for each in self.of:
            each.check()

    def fitted(self, codes: Codes, spec: Any) -> "SeveralConditions":
        return dataclasses.replace(self, of=[each.fitted(codes, spec) for each in self.of])

    def given(self, value: Any) -> Columns:
        """Columns by name, or what each condition takes by the name of the condition."""
        if not isinstance(value, Mapping):
            raise UserError(f"condition: give what {self._names} take by these names")
        known = {each.name: each for each in self.of}
        found: dict[str, Tensor] = {}
        for name, own in value.items():
            found |= known[name].given(own) if name in known else super().given({name: own})
        return found

    def images(self, columns: Columns) -> int:
        return next(each.images(columns) for each in self.of if columns.keys() & set(each.columns))

    def requested(self, request: Request) -> Columns:
        """What each of them makes of its part of the request.

        `condition` is for all of them, or has what is for each by its name; a class that is asked
        for goes before one of `condition`.
        """
        by_name = request.condition if isinstance(request.condition, Mapping) else None
        known = {each.name: request.condition for each in self.of} if by_name is None else by_name
        unknown = sorted(known.keys() - {each.name for each in self.of})
        if unknown:
            raise UserError(f"condition: {unknown[0]} is none of {self._names}")
        if request.class_id is not None and not any(each.takes_class_id for each in self.of):
            super().requested(dataclasses.replace(request, condition=None))
        found: dict[str, Tensor] = {}
        for each in self.of:
            own = dataclasses.replace(request, condition=known.get(each.name))
            if not each.takes_class_id:
                own = dataclasses.replace(own, class_id=None)
            elif by_name is None and (own.is_file or own.class_id is not None):
                own = dataclasses.replace(own, condition=None)
            found |= each.requested(own)
        return found

    @property
    def _names(self) -> str:
        return ", ".join(each.name for each in self.of)
