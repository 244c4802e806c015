import numpy as np
import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.prepare.tokenization.views import VIEWS, build_views, enlarged

SIZE, IDS = 20, torch.tensor([7, 3])


def squares(side: int, channels: int = 1) -> torch.Tensor:
    """Two images whose pixels are all different."""
    return torch.arange(2 * channels * side * side).view(2, channels, side, side)


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_has_a_name_and_the_size_that_was_asked_for(name: str) -> None:
    views = build_views(name, SIZE, 3, 0)
    cut = list(views.cut(squares(views.square), IDS))
    assert len(cut) == len(views.names) == len(set(views.names))
    assert {view.shape for view in cut} == {(2, 1, SIZE, SIZE)}


@pytest.mark.parametrize("name", VIEWS)
def test_a_label_map_is_cut_as_its_image_is(name: str) -> None:
    views = build_views(name, SIZE, 3, 0)
    images = squares(views.square)
    for image, labels in zip(views.cut(images, IDS), views.cut(images[:, 0], IDS), strict=True):
        assert torch.equal(image[:, 0], labels)


def test_ten_crops_are_corners_and_centre_and_their_mirror_images() -> None:
    views = build_views("ten-crop", SIZE, 0, 0)
    images = squares(views.square)
    cut = dict(zip(views.names, views.cut(images, IDS), strict=True))
    assert torch.equal(cut["top left"], images[..., :SIZE, :SIZE])
    assert torch.equal(cut["bottom right"], images[..., -SIZE:, -SIZE:])
    assert torch.equal(cut["bottom right flipped"], cut["bottom right"].flip(-1))
    assert torch.equal(cut["center"], images[..., 1:-1, 1:-1])


@pytest.mark.parametrize("name", VIEWS)
def test_a_crop_tells_where_its_view_lies_in_the_image(name: str) -> None:
    """Of an image whose pixels are their own places, 60 wide and 44 high, the square being all of
    its height and starting at 10 pixels."""
    views = build_views(name, SIZE, 5, 0)
    scale = 44 / views.square
    middles = (torch.arange(views.square) + 0.5) * scale
    across, down = torch.meshgrid((10 + middles) / 60, middles / 44, indexing="xy")
    places = torch.stack([across, down]).double().expand(2, -1, -1, -1)
    crops = views.crops(np.array([[10 / 60, 0, 44 / 60, 1, 0]] * 2), IDS)
    assert crops.shape == (2, len(views.names), 5)
    half = scale * torch.tensor([0.5 / 60, 0.5 / 44])
    for number, view in enumerate(views.cut(places, IDS)):
        for row, (left, top, width, height, mirrored) in enumerate(crops[:, number].tolist()):
            first, last = view[row, :, 0, 0], view[row, :, -1, -1]
            low, high = torch.minimum(first, last) - half, torch.maximum(first, last) + half
            assert low.tolist() == pytest.approx([left, top], abs=1e-6)
            assert high.tolist() == pytest.approx([left + width, top + height], abs=1e-6)
            assert bool(first[0] > last[0]) == bool(mirrored)


def test_random_crops_depend_on_seed_sample_and_number_only() -> None:
    views = build_views("random", SIZE, 4, 1)
    images = squares(enlarged(SIZE))
    cut = list(views.cut(images, IDS))
    alone = list(views.cut(images[1:], IDS[1:]))
    assert all(torch.equal(a[1:], b) for a, b in zip(cut, alone, strict=True))
    other = list(build_views("random", SIZE, 4, 2).cut(images, IDS))
    assert not all(torch.equal(a, b) for a, b in zip(cut, other, strict=True))


def test_random_crops_reach_every_place_and_are_mirrored_half_the_time() -> None:
    views = build_views("random", 2, 400, 0)
    views.square = 4
    rows = torch.arange(4).view(1, 4, 1) * 10 + torch.arange(4).view(1, 1, 4)
    corners = [view[0].min().item() for view in views.cut(rows, torch.tensor([5]))]
    assert set(corners) == {10 * top + left for top in range(3) for left in range(3)}
    mirrored = sum(bool(v[0, 0, 0] > v[0, 0, 1]) for v in views.cut(rows, torch.tensor([5])))
    assert 150 < mirrored < 250


def test_counts_and_seeds_that_there_are_not_are_refused() -> None:
    with pytest.raises(UserError, match="--crops is 0"):
        build_views("random", SIZE, 0, 0)
    with pytest.raises(UserError, match="--seed is -1"):
        build_views("random", SIZE, 1, -1)
