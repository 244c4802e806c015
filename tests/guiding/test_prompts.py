"""Texts with weights, in one line."""

import pytest

from taming_dist.errors import UserError
from taming_dist.guiding.prompts import Prompt, prompts_of


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("a red barn", [("a red barn", 1)]),
        ("a red barn | snow:0.5|people:-.3", [("a red barn", 1), ("snow", 0.5), ("people", -0.3)]),
        ("scene: night", [("scene: night", 1)]),
        ("at 12:30:1", [("at 12:30", 1)]),
        ("a:b.png:2", [("a:b.png", 2)]),
    ],
)
def test_parts_have_the_weight_behind_their_last_colon(
    line: str, found: list[tuple[str, float]]
) -> None:
    assert prompts_of("text", line) == tuple(Prompt(*each) for each in found)


@pytest.mark.parametrize("line", [" ", "a|", "|a", ":2", "a:0", "a:1000001"])
def test_an_empty_part_and_a_weight_that_says_nothing_are_refused(line: str) -> None:
    with pytest.raises(UserError, match="^text: "):
        prompts_of("text", line)
