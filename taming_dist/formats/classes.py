"""Class ids: which numbers they may be, and which the labels of images become.

Imports no torch: the process that decodes reads classes.
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from taming_dist.formats.names import escape, natural_order

# Ids are below: more than any data set has, and fewer than the rows a table of classes could have.
MAX_CLASSES = 2**24
NUMBER = re.compile(r"[+-]?[0-9]{1,100}(\.0*)?")
FRACTION = re.compile(r"[+-]?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def class_fault(number: int) -> str | None:
    """What is wrong with a class id, or None."""
    if 0 <= number < MAX_CLASSES:
        return None
    return f"the class {number} is outside of 0 to {MAX_CLASSES - 1}"


def is_missing(label: Any) -> bool:
    """Whether a label says nothing: None, no text, or NaN, as pandas writes what is missing."""
    return label is None or label == "" or label != label


def whole_number(label: Any) -> int | None:
    """The whole number that a label is, of whatever type: 3, 3.0, True, "3" or "3.0"; else None."""
    if isinstance(label, str):
        text = label.strip()
        return int(text.partition(".")[0]) if NUMBER.fullmatch(text) else None
    if isinstance(label, int | float | Decimal) and math.isfinite(label) and label == int(label):
        return int(label)
    return None


@dataclass(frozen=True)
class Numbering:
    """The class id of each label; `names` by id, None where labels are ids themselves."""

    ids: dict[Any, int]
    names: tuple[str, ...] | None


def number_labels(labels: Collection[Any]) -> Numbering:
    """Number distinct labels: whole numbers are their own ids, names are numbered in order.

    What is missing has no id. Raises `ValueError` on fractions, and on numbers among names.
    """
    said = [label for label in labels if not is_missing(label)]
    numbers = {label: whole_number(label) for label in said}
    names = [label for label in said if numbers[label] is None]
    ids = {label: number for label, number in numbers.items() if number is not None}
    if not names:
        return Numbering(ids, None)
    if all(label in ids or _is_fraction(label) for label in said):
        raise ValueError(f"the label {names[0]!r} is not a class: use whole numbers or names")
    number = next((label for label in said if not isinstance(label, str)), None)
    if number is not None:
        name = next(name for name in names if isinstance(name, str))
        raise ValueError(
            f"the label {number!r} is a number, but {name!r} a name: use either, not both"
        )
    numbered = number_names(said)
    return Numbering(numbered, tuple(map(escape, numbered)))


def _is_fraction(label: Any) -> bool:
    return not isinstance(label, str) or FRACTION.fullmatch(label.strip()) is not None


def number_names(names: Iterable[str]) -> dict[str, int]:
    """Class ids by name: distinct names are numbered in natural order."""
    return {name: number for number, name in enumerate(sorted(set(names), key=natural_order))}
