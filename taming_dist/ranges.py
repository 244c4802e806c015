"""The range of every number that users set: stated at its field, checked when it is set.

    channels: int = ranged(128, at_least=1)

A config class calls `check_ranges(self, "model")` in its `__post_init__`; `cli.number` does the
same for the arguments of tools. NaN and infinity are in no range. `check_choice` is for texts.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple

from omegaconf import MISSING

from taming_dist.errors import UserError

RANGE = "range"  # the key in the metadata of a field
LARGEST_INT = 2**63 - 1  # the largest that tensors and files can hold
LARGEST_SEED = 2**64 - 1


class Kind(NamedTuple):
    """The kind of a numeric field: int or float, possibly a list, possibly optional."""

    number: type
    is_list: bool
    optional: bool


def kind_of(hint: Any) -> Kind | None:
    """The kind of a type hint such as `list[int]` or `float | None`; None if not numeric."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is list:
        return Kind(parts[0], True, False) if parts[0] in (int, float) else None
    if parts and len(parts) < len(typing.get_args(hint)):
        inner = kind_of(parts[0])
        return None if inner is None else inner._replace(optional=True)
    return Kind(hint, False, False) if hint in (int, float) else None


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, or of each number in a list. `length`: the required length of the list;
    `empty`: whether the list may be empty."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    length: int | None = None
    empty: bool = False

    def check(self, key: str, value: Any, kind: Kind) -> None:
        """Raise `UserError` naming the key unless the value has the kind and the range."""
        advice = self.advice(value, kind)
        if advice:
            raise UserError(f"{key}={'null' if value is None else value}: {advice}")

    def advice(self, value: Any, kind: Kind) -> str:
        """What to use instead of the value; empty if it has the kind and is within the range."""
        if value is None and kind.optional:
            return ""
        is_list = isinstance(value, list | tuple)
        parts = value if is_list else [value]
        if is_list == kind.is_list and self._holds_all(parts, kind):
            return ""
        if self.at_most is None and any(too_large(part) for part in parts):
            return f"use a number up to {LARGEST_INT}"
        return f"use {self.words(kind)}"

    def _holds_all(self, parts: Any, kind: Kind) -> bool:
        if kind.is_list and not (self.length in (None, len(parts)) if parts else self.empty):
            return False
        return all(self._holds(part, kind.number) for part in parts)

    def _holds(self, part: Any, number: type) -> bool:
        numeric: Any = Integral if number is int else Real
        if not isinstance(part, numeric) or isinstance(part, bool):
            return False
        if (self.at_most is None and too_large(part)) or not math.isfinite(part):
            return False
        return (
            (self.at_least is None or part >= self.at_least)
            and (self.above is None or part > self.above)
            and (self.at_most is None or part <= self.at_most)
            and (self.below is None or part < self.below)
        )

    def words(self, kind: Kind) -> str:
        """The range in words: "a whole number from 1 to 24"."""
        bounds = (
            ("from", self.at_least),
            ("above", self.above),
            ("to", self.at_most),
            ("to below" if self.above is None else "and below", self.below),
        )
        limits = " ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        text = f"{'whole ' * (kind.number is int)}number{'s' * kind.is_list} {limits}"
        if not kind.is_list:
            return f"a {text}{' or null' * kind.optional}"
        text = f"{self.length or 'one or more'} {text}"
        return f"{text}, or []" if self.empty else text


def too_large(value: Any) -> bool:
    """Whether the value is an integer too large for any tensor."""
    return isinstance(value, Integral) and abs(int(value)) > LARGEST_INT


def ranged(
    default: Any = dataclasses.MISSING,
    *,
    compared: bool = True,
    may_change: bool = False,
    from_data: bool = False,
    **limits: Any,
) -> Any:
    """A field of a config class; the limits are those of `Range`, the marks those of `marked`. A
    list as default is copied. `from_data`: 0 or [] stands for what the data say, so that a run may
    resume with either."""
    marks: dict[str, Any] = {RANGE: Range(**limits), **_marks(compared, may_change)}
    marks["from_data"] = from_data
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=marks)
    return dataclasses.field(default=default, metadata=marks)


def marked(default: Any, *, compared: bool = True, may_change: bool = False) -> Any:
    """A field of a config class that is no number.

    `compared=False`: a run may start from an export (run.init) with another value, because it only
    steers training, or because it shows in the names and shapes of the tensors, which are compared
    too. `may_change`: it may be another when a run resumes.
    """
    return dataclasses.field(default=default, metadata=_marks(compared, may_change))


def _marks(compared: bool, may_change: bool) -> dict[str, bool]:
    return {"compared": compared, "may_change": may_change}


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """UserError unless the value of a key is one of those that are known."""
    if value not in known:
        raise UserError(f"{key}={value}: use {' or '.join(known)}")


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every number of a config class; raise `UserError` naming `prefix` and the key."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        limits: Range | None = field.metadata.get(RANGE)
        value, kind = getattr(config, field.name), kind_of(hints[field.name])
        if limits is not None and kind is not None and value != MISSING:
            limits.check(f"{prefix}.{field.name}".lstrip("."), value, kind)
