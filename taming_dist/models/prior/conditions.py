"""What stands before the image's tokens: the condition c of p(s | c), as a short prefix of tokens.

Source: arXiv 2012.09841, section 3.2, equation 9 ("prepend c to s"). The prefix is numbers from 0
to `vocabulary` - 1; whether they have a table of embeddings of their own is the transformer's
business (`condition_table`).

A condition is a class and one line in CONDITIONS, by the name that `model/condition=` has. Its
fields are its keys below `model.condition`. Everything else asks it: training what it reads of a
batch, sampling what the user has to give, both whether the code shards are of its kind.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, marked, ranged

START_TOKEN = 0
Columns = Mapping[str, Tensor]
Config = TypeVar("Config")


class Codes(Protocol):
    """What a condition asks of a data set of codes (`taming_dist.data.codes.CodeDataset`)."""

    vocabulary: int
    grid: tuple[int, int]
    tokenizer_fingerprint: str
    condition: Mapping[str, Any] | None
    num_classes: int
    class_names: tuple[str, ...] | None

    @property
    def num_samples(self) -> int: ...
    @property
    def classes_present(self) -> bool: ...
    def check_classes(self) -> None: ...
    def require(self, columns: Sequence[str]) -> None: ...
    def first(self, count: int, columns: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Request:
    """What the user of the sampling command asks for: `count` images; `class_id` and `condition` as
    they were typed, None if they were not; `open_codes` opens the code shards of a spec."""

    count: int
    open_codes: Callable[[Any], Codes]
    class_id: int | None = None
    condition: Any = None


class Condition(ABC):
    """How a batch's condition becomes the prefix that the transformer reads first.

    `columns`: what it reads of a batch of codes, of `taming_dist.data.codes.COLUMNS`.
    `has_table`: whether its tokens may have a table of embeddings of their own.
    """

    name: str
    columns: ClassVar[tuple[str, ...]] = ()
    has_table: ClassVar[bool] = True

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of the prefix, m; at least 1, from which the image's first is predicted."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many different tokens there are."""

    @abstractmethod
    def prefix(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return the prefix of `count` images from their columns, on the CPU, where
        values can be checked.

        Raises:
            UserError: a column is missing, or has what the model knows no token for.
        """

    def check(self) -> None:
        """Raise a UserError, naming the key, if its keys do not describe a condition."""
        if self.length < 1 or self.vocabulary < 1:
            raise UserError(
                f"model/condition={self.name}: a prefix of {self.length} tokens, of "
                f"{self.vocabulary} there are, is none; give its keys"
            )

    def fitted(self, codes: Codes, spec: Any) -> "Condition":
        """Return it with what the code shards say where its keys leave it open.

        Raises:
            UserError: they lack what it reads, or are not of its kind; `spec` names them.
        """
        codes.require(self.columns)
        return self

    def given(self, value: Any) -> Columns:
        """Return the columns of what Python gives for it: all of them by name, or its only one."""
        if isinstance(value, Mapping):
            return value
        return {self.columns[0]: torch.as_tensor(value).cpu()}

    def requested(self, request: Request) -> Columns:
        """Return the columns of the images that sampling is asked for.

        Unless it has another way, they are those of the first samples of `condition=SHARDS`.

        Raises:
            UserError: the request does not say what it needs, or what it cannot use.
        """
        if request.class_id is not None:
            raise UserError("class_id: this transformer is not class-conditional, leave it out")
        if request.condition is None:
            return {}
        codes, spec = request.open_codes(request.condition), request.condition
        try:
            self.fitted(codes, spec)
        except UserError as error:
            raise UserError(f"condition: {error}") from error
        if request.count > codes.num_samples:
            raise UserError(
                f"n: {request.count} images need as many samples in {spec}, which has "
                f"{codes.num_samples}"
            )
        return codes.first(request.count, self.columns)

    def period(self, request: Request) -> int:
        """After how many images of a request the conditions repeat; 1 where they do not."""
        return 1


@dataclass
class Unconditional(Condition):
    """One start token, the same for every image."""

    name: str = "none"
    has_table: ClassVar[bool] = False

    @property
    def length(self) -> int:
        return 1

    @property
    def vocabulary(self) -> int:
        return START_TOKEN + 1

    def prefix(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
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


@dataclass
class ClassCondition(Condition):
    """One token, the class of the image. `classes`: how many there are, 0: as the shards say."""

    classes: int = ranged(0, at_least=0)
    name: str = "class"
    columns: ClassVar[tuple[str, ...]] = ("cls",)

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")

    @property
    def length(self) -> int:
        return 1

    @property
    def vocabulary(self) -> int:
        return self.classes

    def prefix(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
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
        """The class asked for, or else all classes in turn."""
        if request.condition is not None:
            raise UserError(
                "condition: this transformer is conditioned on classes, not on codes: give "
                "class_id, or leave both out"
            )
        if request.class_id is not None:
            return {"cls": torch.full((request.count,), request.class_id)}
        return {"cls": torch.arange(request.count) % self.classes}

    def period(self, request: Request) -> int:
        return self.classes if request.class_id is None else 1


@dataclass
class CodesCondition(Condition):
    """The codes that a second VQGAN gives a label map, a depth map or the like, row by row.

    Vocabulary, `grid` and fingerprint are those of the second VQGAN's codes; left out, they are as
    the code shards say. Source: arXiv 2012.09841, section 3.2, "conditioned synthesis".
    """

    vocabulary: int = ranged(0, at_least=0)
    grid: list[int] = ranged([], at_least=1, length=2, empty=True)
    fingerprint: str = marked("", compared=False)
    name: str = "codes"
    columns: ClassVar[tuple[str, ...]] = ("cond",)

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")

    @property
    def length(self) -> int:
        return prod(self.grid)

    def prefix(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return codes [b, k, l] as prefix, m = k * l."""
        given = columns.get("cond")
        if given is None:
            raise UserError(
                "condition: this transformer is conditioned on the codes of a second VQGAN, give "
                "code shards that have them (tools/tokenize_dataset.py --condition-model)"
            )
        if given.shape != (count, *self.grid):
            raise UserError(
                f"condition: {count} images need codes of the grid {list(self.grid)}, not "
                f"{list(given.shape)}"
            )
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < self.vocabulary:
            raise UserError(f"condition: a code is outside of 0 to {self.vocabulary - 1}")
        return given.long().flatten(1)

    def check(self) -> None:
        if not self.grid or self.vocabulary < 1:
            raise UserError(
                f"model.condition.grid={list(self.grid)} and model.condition.vocabulary="
                f"{self.vocabulary} describe no codes: leave them out, they are those of the code "
                f"shards"
            )

    def fitted(self, codes: Codes, spec: Any) -> "CodesCondition":
        found = codes.condition
        if found is None:
            raise UserError(
                f"model/condition=codes, but {spec} has codes of images only: make "
                f"them with tools/tokenize_dataset.py --condition-model EXPORT"
            )
        facts = {"vocabulary": found["vocab"], "grid": list(found["grid"])}
        return agreed(self, facts | {"fingerprint": found["fingerprint"]}, "model.condition", spec)


def agreed(config: Config, found: Mapping[str, Any], key: str, spec: Any) -> Config:
    """Return a config class with the values that code shards have; `key` is its own, such as model.

    Raises:
        UserError: it has another value already; `spec` names the shards.
    """
    for name, value in found.items():
        asked = getattr(config, name)
        if asked and asked != value:
            raise UserError(
                f"{key}.{name} is {asked}, but the codes of {spec} have {value}: use the codes of "
                f"that tokenizer, or another run"
            )
    return dataclasses.replace(config, **found)  # type: ignore[type-var]


# name in conf/model/condition -> the condition; the first is the default
CONDITIONS: dict[str, type[Condition]] = {
    "none": Unconditional,
    "class": ClassCondition,
    "codes": CodesCondition,
}
