"""Which keys of two configs of a model change its answers although no tensor shows it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A key of a config class, its value in an export and in the run to start from it."""

    key: str
    theirs: Any
    ours: Any


def other_answers(
    theirs: Any, ours: Any, key: str = "model", every: bool = False
) -> Iterator[Difference]:
    """Yield the keys, below `key`, in which two configs of a model differ.

    Every field of a config class counts, those of config classes inside it too, unless it is marked
    `compared=False` (see `ranges.marked`): a new key is compared until it says that it need not be.
    `every`: those that are marked count, too.
    """
    if type(theirs) is not type(ours):
        yield Difference(key, called(theirs), called(ours))
    elif of_configs(ours) and len(theirs) == len(ours):
        for index, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from other_answers(*pair, f"{key}.{index}", every)
    elif not dataclasses.is_dataclass(ours):
        if theirs != ours:
            yield Difference(key, theirs, ours)
    else:
        for field in dataclasses.fields(ours):
            if every or field.metadata.get("compared", True):
                pair = getattr(theirs, field.name), getattr(ours, field.name)
                yield from other_answers(*pair, f"{key}.{field.name}", every)


def of_configs(value: Any) -> bool:
    """Whether a value is a list of config classes."""
    return isinstance(value, list) and any(map(dataclasses.is_dataclass, value))


def called(value: Any) -> Any:
    """A config class by the name that it is chosen by, anything else as it is."""
    if of_configs(value):
        return [called(each) for each in value]
    return getattr(value, "name", value)
