"""Several things that a picture is led toward, or away from, in one line: "a barn | fog:-0.5"."""

import re
from dataclasses import dataclass

from taming_dist.errors import UserError

WEIGHTED = re.compile(r"(.*?)\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))", re.DOTALL)
LARGEST = 1e6
SEPARATOR = "|"


@dataclass(frozen=True)
class Prompt:
    """A text, or the file of a picture; below 0 its `weight` leads away from it."""

    content: str
    weight: float = 1.0


def prompts_of(key: str, line: str) -> tuple[Prompt, ...]:
    """The parts of "one | another:2 | less of this:-0.5". A number after the last colon of a part
    is its weight; a text that itself ends so is given one as well ("at 12:30:1").

    Raises:
        UserError: a part is empty, or a weight is 0 or too large; names `key`.
    """
    return tuple(_prompt(key, part.strip()) for part in line.split(SEPARATOR)) if line else ()


def _prompt(key: str, part: str) -> Prompt:
    match = WEIGHTED.fullmatch(part)
    content, weight = (match[1], float(match[2])) if match else (part, 1.0)
    if not content.strip():
        raise UserError(f'{key}: a part of it is empty, give {key}="a red barn | snow:0.5"')
    if weight == 0 or abs(weight) > LARGEST:
        raise UserError(
            f"{key}: the weight of {content!r} is {weight:g}: give another one, or leave it out"
        )
    return Prompt(content, weight)
