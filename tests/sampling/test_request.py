"""What a command asks for, read from its words."""

import pytest

from taming_dist.errors import UserError
from taming_dist.sampling.request import parse_size


def test_a_size_is_height_and_width_or_the_side_of_a_square() -> None:
    assert parse_size("512x1024") == (512, 1024)
    assert parse_size("256") == (256, 256)
    assert parse_size(None) is None


@pytest.mark.parametrize("text", ["", "x", "512x", "x512", "512 x 512", "-8", "8.0", "8x8x8"])
def test_other_words_are_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is no size, give HEIGHTxWIDTH such as 256x512, or a side"):
        parse_size(text)
