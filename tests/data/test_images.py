import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from taming_dist.data.images import (
    COLUMNS,
    CenterCrop,
    Crop,
    Preprocess,
    RandomCrop,
    RandomResizedCrop,
    centre_view,
    copy_backwards,
    resize_short_side,
)
from taming_dist.data.order import PIXELS as PIXELS_PURPOSE
from taming_dist.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rows_are_copied_backwards(width: int, dtype: type[np.generic]) -> None:
    for pixels in (PIXELS[:, 3 : 3 + width], PIXELS[:, 3 : 3 + width, 0]):
        pixels = pixels.astype(dtype) if dtype is np.float32 else pixels
        out = np.empty(pixels.shape, dtype)
        copy_backwards(pixels, out)
        assert np.array_equal(out, pixels[:, ::-1, ::-1] if pixels.ndim == 3 else pixels[:, ::-1])


def test_the_short_side_is_resized_only_if_it_differs() -> None:
    assert resize_short_side(PIXELS, 12) is PIXELS
    assert resize_short_side(PIXELS, 6).shape == (6, 10, 3)
    assert resize_short_side(PIXELS.transpose(1, 0, 2), 24).shape == (40, 24, 3)


@given(st.integers(0, 2**62), st.integers(0, 99), st.integers(0, 2**40))
def test_the_words_of_a_sample_are_their_share_of_one_stream(
    seed: int, epoch: int, sample: int
) -> None:
    many, place = divmod(sample, 64)
    counter = np.array([0, epoch, many, 0], dtype=np.uint64)
    key = np.array([seed, PIXELS_PURPOSE], dtype=np.uint64)
    stream = np.random.Philox(key=key, counter=counter).random_raw(64 * 23)
    expected = stream[23 * place : 23 * place + 23].tolist()
    assert Preprocess(8).words(seed, epoch, sample) == expected


def cut(preprocess: Preprocess, pixels: np.ndarray, *place: int, column: str = "") -> np.ndarray:
    """The view of `pixels` that (seed, epoch, sample) gives."""
    view = preprocess.view(*pixels.shape[:2], preprocess.words(*place))
    out = np.empty((*view.shape, *pixels.shape[2:]), dtype=pixels.dtype)
    stored = pixels[..., ::-1] if view.flipped and pixels.ndim == 3 else pixels
    view.cut(stored, out, COLUMNS[column].method if column else Image.Resampling.LANCZOS)
    return out


def test_the_centre_is_cut_from_the_centre() -> None:
    assert np.array_equal(cut(Preprocess(12), PIXELS, 0, 0, 0), PIXELS[:, 4:16])


@pytest.mark.parametrize("size", [7, 12, 30])
@pytest.mark.parametrize("shape", [(24, 41, 3), (41, 24, 3), (24, 24, 3)])
def test_a_cut_is_what_resizing_all_of_the_image_and_cutting_gives(
    size: int, shape: tuple[int, ...]
) -> None:
    # smooth, because Pillow rounds between its two passes
    ramp = np.linspace(0, 255, int(np.prod(shape))).astype(np.uint8).reshape(shape)
    pixels = np.array(Image.fromarray(ramp).resize((shape[1], shape[0])))
    whole = resize_short_side(pixels, size)
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    expected = whole[top : top + size, left : left + size].astype(int)
    assert np.abs(cut(Preprocess(size), pixels, 0, 0, 0) - expected).max() <= 2


def test_the_centre_may_have_any_proportions() -> None:
    view = centre_view(12, 20, (12, 14))  # nothing is resized
    out = np.empty((12, 14, 3), np.uint8)
    view.cut(PIXELS, out)
    assert np.array_equal(out, PIXELS[:, 3:17])
    assert centre_view(12, 20, (6, 6)) == Preprocess(6).view(12, 20, Preprocess(6).words(0, 0, 0))
    assert centre_view(12, 20, (24, 20))[:4] == (5, 0, 10, 12)


CROPS = [RandomCrop(), CenterCrop(), RandomResizedCrop(scale=(0.1, 0.9))]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
def test_image_label_map_and_depth_are_cut_and_flipped_alike(crop: Crop) -> None:
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([rows * 5, columns * 4, rows], axis=-1).astype(np.uint8)
    preprocess = Preprocess(16, crop, flip=True)
    for sample in range(20):
        image = cut(preprocess, pixels, 3, 1, sample).astype(int)
        for name, dtype in (("seg.png", np.uint8), ("depth.png", np.float32)):
            for channel in (0, 1):
                column = pixels[..., channel].astype(dtype)
                found = cut(preprocess, column, 3, 1, sample, column=name)
                # nearest is off by up to half a pixel, which is 5 levels here
                assert np.abs(found - image[..., channel]).max() <= 6


def test_resized_crops_keep_to_their_scale_and_ratio_and_stay_inside() -> None:
    crop = RandomResizedCrop(scale=(0.2, 0.6), ratio=(0.5, 2.0))
    preprocess = Preprocess(8, crop)
    views = [preprocess.view(90, 120, preprocess.words(0, 0, id)) for id in range(300)]
    shares = np.array([view.width * view.height / (90 * 120) for view in views])
    ratios = np.array([view.width / view.height for view in views])
    assert 0.19 < shares.min() < 0.23 < 0.55 < shares.max() < 0.61
    assert 0.45 < ratios.min() < 0.6 < 1.7 < ratios.max() < 2.1
    assert all(0 <= v.left <= 120 - v.width and 0 <= v.top <= 90 - v.height for v in views)
    assert len({(view.left, view.top) for view in views}) > 250


def test_a_shape_that_never_fits_falls_back_to_the_centre() -> None:
    preprocess = Preprocess(8, RandomResizedCrop((1.0, 1.0), (3.0, 4.0)))
    view = preprocess.view(20, 30, preprocess.words(0, 0, 0))
    assert (view.left, view.top, view.width, view.height) == (5.0, 0, 20, 20)


def test_crops_depend_on_seed_epoch_and_sample_and_reach_every_place() -> None:
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8), (8, 20))
    pixels = np.stack([columns] * 3, axis=-1)
    preprocess = Preprocess(8, RandomCrop(), flip=True)

    def draw(seed: int, epoch: int, sample: int) -> tuple[int, bool]:
        row = cut(preprocess, pixels, seed, epoch, sample)[0, :, 0].astype(int)
        return int(row.min()), bool(row[0] > row[-1])

    drawn = [draw(0, 0, sample) for sample in range(400)]
    assert drawn == [draw(0, 0, sample) for sample in range(400)]
    assert drawn != [draw(0, 1, sample) for sample in range(400)]
    assert drawn != [draw(1, 0, sample) for sample in range(400)]
    assert {left for left, _ in drawn} == set(range(13))
    assert 150 < sum(flipped for _, flipped in drawn) < 250


@pytest.mark.parametrize(
    ("options", "key"),
    [({"scale": (0.0, 1.0)}, "crop_scale"), ({"scale": (0.5, 2.0)}, "crop_scale"),
     ({"ratio": (2.0, 1.0)}, "crop_ratio")],
)  # fmt: skip
def test_a_range_that_cannot_be_drawn_from_is_a_users_mistake(options: dict, key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{key} is \["):
        RandomResizedCrop(**options)
