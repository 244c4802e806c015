"""The class of an image as one token."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.interface import Codes, Columns, Condition, Request
from taming_dist.ranges import check_ranges, ranged


@dataclass
class ClassCondition(Condition):
    """One token, the class of the image. `classes`: how many there are, 0: as the shards say."""

    classes: int = ranged(0, at_least=0, from_data=True)
    name: str = "class"
    columns: ClassVar[tuple[str, ...]] = ("cls",)
    takes_class_id: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")

    @property
    def length(self) -> int:
        return 1

    @property
    def vocabulary(self) -> int:
        return self.classes

    def part(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return classes as prefix, one token each."""
        given = columns.get("cls")
        if given is None:
            raise UserError("class_id: this transformer is class-conditional, give classes for it")
        if given.shape != (count,):
            raise UserError(f"class_id: {count} images need {count} classes, not {len(given)}")
        outside = given[(given < 0) | (given >= self.classes)]
        if outside.numel():
            raise UserError(
                f"class_id: {int(outside[0])} is outside the model's classes, "
                f"give 0 to {self.classes - 1}"
            )
        return given.long().unsqueeze(1)

    def check(self) -> None:
        if self.classes < 1:
            raise UserError(
                f"model.condition.classes: {self.classes} is too few for model/condition=class, "
                f"give at least 1"
            )

    def fitted(self, codes: Codes, spec: Any) -> "ClassCondition":
        if not codes.classes_present:
            raise UserError(
                f"model/condition=class, but the codes of {spec} have no classes: make image "
                f"shards with labels (tools/make_shards.py --labels folders) and tokenize them"
            )
        codes.check_classes()
        classes = self.classes or max(codes.num_classes, len(codes.class_names or ()))
        if codes.num_classes > classes:
            raise UserError(
                f"model.condition.classes={self.classes}, but {spec} has classes up to "
                f"{codes.num_classes - 1}"
            )
        return dataclasses.replace(self, classes=classes)

    def requested(self, request: Request) -> Columns:
        """The class asked for, those of the samples of code shards, or all in turn."""
        if request.condition is not None and request.class_id is not None:
            raise UserError(
                "class_id: the classes are those of condition already, leave one of the two out"
            )
        if request.condition is not None:
            return super().requested(request)
        if request.class_id is not None:
            return {"cls": torch.full((request.count,), request.class_id)}
        return {"cls": torch.tensor(request.images) % self.classes}

    def period(self, request: Request) -> int:
        in_turn = request.class_id is None and request.condition is None
        return self.classes if in_turn else 1
