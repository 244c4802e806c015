import sys

import numpy as np
import pytest

from taming_dist.errors import UserError
from taming_dist.prepare.making.derived import canny_edges, low_resolution, require_canny


def test_edges_lie_where_the_image_has_a_step() -> None:
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 30:] = 200
    edges = canny_edges(pixels)
    assert edges.dtype == np.uint8
    assert edges.shape == (40, 60)
    assert set(np.unique(edges)) == {0, 255}
    assert set(np.flatnonzero(edges[20])) <= {29, 30}
    assert not canny_edges(np.full((40, 60, 3), 90, dtype=np.uint8)).any()


@pytest.mark.parametrize(("shape", "small"), [((64, 96), (16, 24)), ((33, 20), (9, 5))])
def test_a_low_resolution_image_is_smaller_by_the_factor(
    shape: tuple[int, int], small: tuple[int, int]
) -> None:
    ramp = np.linspace(0, 255, shape[1]).astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (*shape, 3))
    found = low_resolution(np.ascontiguousarray(pixels), 4)
    assert found.shape == (*small, 3)
    assert abs(float(found.mean()) - float(pixels.mean())) < 3


def test_without_scikit_image_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_canny()
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(UserError, match=r"pip install 'taming_dist\[canny\]'"):
        require_canny()
