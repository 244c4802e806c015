"""Which keys of two configs of a model change its answers although no tensor shows it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A key of a config class, its value in an export and in the run to start from it."""

    key: str
    theirs: Any
    ours: Any


def other_answers(theirs: Any, ours: Any, key: str = "model") -> Iterator[Difference]:
    """Yield the keys, below `key`, in which two configs of a model differ.

    Every field of a config class counts, those of config classes inside it too, unless it is marked
    `compared=False` (see `ranges.marked`): a new key is compared until it says that it need not be.
    """
    if type(theirs) is not type(ours):
        yield Difference(key, called(theirs), called(ours))
    elif not dataclasses.is_dataclass(ours):
        if theirs != ours:
            yield Difference(key, theirs, ours)
    else:
        for field in dataclasses.fields(ours):
            if field.metadata.get("compared", True):
                pair = getattr(theirs, field.name), getattr(ours, field.name)
                yield from other_answers(*pair, f"{key}.{field.name}")


def called(value: Any) -> Any:
    """A config class by the name that it is chosen by, anything else as it is."""
    return getattr(value, "name", value)
