"""Class ids: their range, and how the labels of images are turned into them.

Does not import torch: the decoding process reads classes.
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from taming_dist.formats.names import escape, natural_order

# An upper bound on ids: more classes than any data set has, and still a possible embedding table.
MAX_CLASSES = 2**24
NUMBER = re.compile(r"[+-]?[0-9]{1,100}(\.0*)?")
FRACTION = re.compile(r"[+-]?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def class_fault(number: int) -> str | None:
    """What is wrong with a class id, or None."""
    if 0 <= number < MAX_CLASSES:
        return None
    return f"the class {number} is outside the range 0 to {MAX_CLASSES - 1}"


def is_missing(label: Any) -> bool:
    """Whether a label is missing: None, an empty string, or NaN, as pandas writes it."""
    return label is None or label == "" or label != label


def whole_number(label: Any) -> int | None:
    """The integer value of a label of any type (3, 3.0, True, "3", "3.0"), or None."""
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
    """Number distinct labels: whole numbers are their own ids, names are numbered in natural order.

    Missing labels get no id.

    Raises:
        ValueError: fractions, or numbers mixed with names.
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
            f"the label {number!r} is a number, but {name!r} is a name: use one or the other"
        )
    numbered = number_names(said)
    return Numbering(numbered, tuple(map(escape, numbered)))


def _is_fraction(label: Any) -> bool:
    return not isinstance(label, str) or FRACTION.fullmatch(label.strip()) is not None


def number_names(names: Iterable[str]) -> dict[str, int]:
    """Class ids by name: distinct names are numbered in natural order."""
    return {name: number for number, name in enumerate(sorted(set(names), key=natural_order))}
