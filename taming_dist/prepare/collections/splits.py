"""The names that data sets use for their splits."""

from collections.abc import Iterable
from pathlib import Path

SPELLINGS = (("train", "training"), ("val", "validation"))


def spellings(split: str) -> tuple[str, ...]:
    """The possible names of a split, the given one first."""
    for names in SPELLINGS:
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def find(paths: Iterable[Path]) -> Path | None:
    """The first of the paths that exists."""
    return next((path for path in paths if path.exists()), None)
