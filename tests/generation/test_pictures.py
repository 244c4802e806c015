"""From model range to bytes, and many pictures as one grid."""

import torch

from taming_dist.generation.pictures import GAP, WHITE, beside_given, image_grid, to_uint8


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


def numbered(*numbers: int) -> list[torch.Tensor]:
    return [torch.full((1, 1, 1), number, dtype=torch.uint8) for number in numbers]


def order(pictures: list[torch.Tensor]) -> list[int]:
    return [int(picture) for picture in pictures]


def test_what_was_given_stands_before_what_was_made_of_it() -> None:
    one, columns = beside_given(numbered(0, 1, 2), lambda _: numbered(90), 1, 10)
    assert (order(one), columns) == ([90, 0, 1, 2], 2)
    pairs, columns = beside_given(numbered(0, 1, 2), lambda k: numbered(90 + k), 3, 4)
    assert (order(pairs), columns) == ([90, 0, 91, 1, 92, 2], 4)
    turns, columns = beside_given(numbered(0, 1, 2), lambda k: numbered(90 + k), 2, 10)
    assert (order(turns), columns) == ([90, 0, 2, 91, 1, 255], 6)
    many, columns = beside_given(numbered(*range(20)), lambda k: numbered(90 + k), 2, 3)
    assert (order(many), columns) == ([90, 0, 2, 91, 1, 3], 3)


def test_where_nothing_was_given_a_period_is_a_row() -> None:
    for count, period, columns in ((7, 3, 3), (7, 1, 3), (7, 40, 3), (200, 1, 10)):
        found, across = beside_given(numbered(*range(count)), lambda _: [], period, 10)
        assert (order(found), across) == (list(range(count)), columns)
