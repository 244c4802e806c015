"""Small pictures of large ones that come in strips."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.sampling.thumbnails import SIDE, Thumbnail, reduced


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 1300), width=st.integers(1, 1300), rows=st.integers(1, 200))
def test_a_small_picture_has_the_means_of_squares_however_its_strips_are_cut(
    height: int, width: int, rows: int
) -> None:
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    small = Thumbnail(height, width)
    assert torch.equal(torch.cat(list(small.passing(picture.split(rows, 1))), 1), picture)
    found, factor = small.pixels(), small.factor
    tall, wide = height // factor, width // factor
    squares = picture[:, : tall * factor, : wide * factor].double()
    means = squares.unflatten(2, (wide, factor)).unflatten(1, (tall, factor)).mean((2, 4))
    assert torch.equal(found, means.round().byte())
    assert max(found.shape[1:]) <= SIDE or min(height, width) < factor * 2


def test_a_picture_that_is_small_already_stays_as_it_is() -> None:
    picture = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert torch.equal(reduced(picture), picture)
