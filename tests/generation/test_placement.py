"""Where the window stands, against the original's rule, and waves of codes that are independent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.errors import UserError
from taming_dist.generation.placement import Placement


@given(st.integers(1, 9).map(lambda half: 2 * half), st.integers(0, 40))
def test_the_window_stands_where_the_original_has_it(side: int, more: int) -> None:
    whole = side + more
    tops = Placement((side, side), (whole, side)).tops
    for place in range(whole):
        if place <= side // 2:
            inside = place
        elif whole - place < side // 2:
            inside = side - (whole - place)
        else:
            inside = side // 2
        assert place - tops[place] == inside


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    sides = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    image = sides[0] + draw(st.integers(0, 9)), sides[1] + draw(st.integers(0, 9))
    return Placement(sides, image, draw(st.integers(1, min(side - side // 2 for side in sides))))


@given(placements())
@settings(max_examples=50, deadline=None)
def test_every_code_is_in_its_window_which_is_in_the_image(placement: Placement) -> None:
    (rows, columns), (height, width) = placement.sides, placement.image
    middle = min(rows // 2, height - rows), min(columns // 2, width - columns)
    for i, top in enumerate(placement.tops):
        assert 0 <= top <= i < top + rows <= height
        assert i - top >= min(i, middle[0])
        for j, left in enumerate(placement.lefts):
            assert 0 <= left <= j < left + columns <= width
            assert placement.read[i * width + j] == (i - top) * columns + j - left
            window = placement.window(int(placement.corners[i * width + j]))
            assert (window.top, window.left) == (top, left)
            assert (window.sides, window.image) == (placement.sides, placement.image)
    assert len(set(placement.corners.tolist())) == len(set(placement.tops)) * len(
        set(placement.lefts)
    )


@given(placements())
@settings(max_examples=50, deadline=None)
def test_no_code_reads_one_of_its_own_wave_or_of_a_later_one(placement: Placement) -> None:
    (_, columns), (height, width) = placement.sides, placement.image
    waves = placement.waves()
    assert sorted(np.concatenate(waves)) == list(range(height * width))
    written = np.zeros((height, width), bool)
    for wave in waves:
        assert wave.size
        for i, j in zip(*np.divmod(wave, width), strict=True):
            top, left = placement.tops[i], placement.lefts[j]
            assert written[top:i, left : left + columns].all()
            assert written[i, left:j].all()
        written.reshape(-1)[wave] = True


def test_waves_are_as_wide_as_windows_fit_beside_each_other() -> None:
    waves = Placement((16, 16), (64, 64)).waves()
    assert max(wave.size for wave in waves) == 64 // 16
    assert len(waves) == 64 + 63 * 16


@pytest.mark.parametrize(
    ("image", "step", "message"),
    [
        ((3, 9), 1, "size: 3x9 codes are too few for .* window of 4x5"),
        ((9, 9), 3, "window_step: a window of 4x5 codes moves by 1 to 2 of them at once, not by 3"),
        ((9, 9), 0, "window_step: .* not by 0"),
        ((2**12 + 1, 2**12), 1, "size: 4097x4096 codes are too many: give .* at most 16777216"),
    ],
)
def test_placements_that_there_are_not_are_refused(
    image: tuple[int, int], step: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Placement((4, 5), image, step)
