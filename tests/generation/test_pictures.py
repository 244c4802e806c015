"""From model range to bytes, and many pictures as one grid."""

import torch

from taming_dist.generation.pictures import GAP, WHITE, image_grid, to_uint8


def test_the_model_range_covers_all_bytes_and_the_rest_is_clamped() -> None:
    images = torch.tensor([-1.5, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5)
    assert to_uint8(images).flatten().tolist() == [0, 0, 128, 255, 255]


def test_every_byte_survives_the_way_to_the_model_and_back() -> None:
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.byte())


def test_a_grid_shows_pictures_row_by_row() -> None:
    pictures = torch.arange(5 * 3 * 4 * 6).remainder(200).byte().reshape(5, 3, 4, 6)
    image = image_grid(pictures, columns=3)
    assert image.shape == (3, 2 * 4 + GAP, 3 * 6 + 2 * GAP)
    for index, picture in enumerate(pictures):
        top, left = index // 3 * (4 + GAP), index % 3 * (6 + GAP)
        assert torch.equal(image[:, top : top + 4, left : left + 6], picture)
    assert (image[:, 4 + GAP :, 2 * (6 + GAP) :] == WHITE).all()
    assert (image[:, 4 : 4 + GAP] == WHITE).all()


def test_fewer_pictures_than_columns_make_one_short_row() -> None:
    narrow = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    assert image_grid(narrow, columns=8).shape == (3, 4, 12 + GAP)
