"""The geometry of cut-outs, against what is slow and obvious."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.guiding.cutouts import (
    Boxes,
    cut_out,
    draw_boxes,
    margin_of,
    shifted,
    turned,
)


def picture(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def boxes(*rows: tuple[float, float, float, float, bool]) -> Boxes:
    *numbers, flipped = zip(*rows, strict=True)
    return Boxes(*(torch.tensor(each) for each in numbers), torch.tensor(flipped))


def slowly(image: Tensor, top: float, left: float, tall: float, wide: float, size: int) -> Tensor:
    """A cut-out pixel by pixel: the triangle-weighted mean of the pixels about its centre."""

    def weights(start: float, length: float, number: int, pixels: int) -> list[float]:
        scale = length / size
        centre = min(max(start + (number + 0.5) * scale, 0.5), pixels - 0.5)
        found = [max(0.0, 1 - abs(p + 0.5 - centre) / max(1, scale)) for p in range(pixels)]
        return [each / sum(found) for each in found]

    _, channels, height, width = image.shape
    out = torch.zeros(channels, size, size)
    for p in range(size):
        for q in range(size):
            for y, own in enumerate(weights(top, tall, p, height)):
                for x, other in enumerate(weights(left, wide, q, width)):
                    out[:, p, q] += own * other * image[0, :, y, x]
    return out


def test_cut_outs_are_those_of_loops_over_all_pixels() -> None:
    image = picture(9, 13)
    chosen = [(1.3, 2.6, 4.2, 5.1, False), (0.0, 4.0, 9.0, 9.0, True), (-1.0, 7.5, 8.0, 8.0, False)]
    found = cut_out(image, boxes(*chosen), 5)
    for each, (top, left, tall, wide, flipped) in zip(found, chosen, strict=True):
        expected = slowly(image, top, left, tall, wide, 5)
        torch.testing.assert_close(each, expected.flip(-1) if flipped else expected)


@pytest.mark.parametrize("size", [5, 12, 31])
def test_a_whole_picture_is_resized_as_torch_resizes_it(size: int) -> None:
    image = picture(12, 12)
    found = cut_out(image, boxes((0.0, 0.0, 12.0, 12.0, False)), size)
    expected = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected)


def test_a_margin_shows_what_lies_around_a_cut_out() -> None:
    image, box = picture(12, 12), boxes((3.0, 4.0, 6.0, 6.0, False))
    within = cut_out(image, box, 6, margin=2)[..., 2:-2, 2:-2]
    torch.testing.assert_close(within, cut_out(image, box, 6))
    torch.testing.assert_close(within, image[..., 3:9, 4:10])
    torch.testing.assert_close(cut_out(image, box, 6, margin=2), image[..., 1:11, 2:12])


def test_boxes_are_squares_within_the_picture_from_the_smallest_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = draw_boxes((20, 30), 2000, generator, smallest=0.25)
    assert drawn.height.equal(drawn.width)
    assert 5 <= drawn.height.min() < 5.2
    assert 19.8 < drawn.height.max() <= 20
    for start, length, side in ((drawn.top, drawn.height, 20), (drawn.left, drawn.width, 30)):
        assert start.min() >= -1e-4
        assert (start + length).max() <= side + 1e-4
    assert drawn.height.mean() == pytest.approx(12.5, abs=0.3)
    assert drawn.flipped.float().mean() == pytest.approx(0.5, abs=0.05)
    smaller = draw_boxes((20, 30), 2000, generator, smallest=0.25, power=3.0, flips=False)
    assert smaller.height.mean() == pytest.approx(5 + 15 / 4, abs=0.4)
    assert not smaller.flipped.any()


def test_shifted_rows_are_read_between_pixels() -> None:
    rows = torch.arange(6.0).expand(1, 1, 3, 6)
    by = torch.tensor([[0.0, 1.25, -2.0]])
    expected = [[0, 1, 2, 3, 4, 5], [1.25, 2.25, 3.25, 4.25, 3.75, 0], [0, 0, 0, 1, 2, 3]]
    torch.testing.assert_close(shifted(rows, by)[0, 0], torch.tensor(expected))


def test_the_gradient_of_a_shift_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    by = 4 * torch.rand(2, 3, dtype=torch.float64, generator=generator) - 2
    assert torch.autograd.gradcheck(lambda x: shifted(x, by), (rows,))


@pytest.mark.parametrize("angle", [math.radians(10), -math.radians(7)])
def test_a_smooth_cut_out_is_turned_as_its_formula_says(angle: float) -> None:
    size, margin = 32, margin_of(abs(angle), 32)
    places = torch.arange(size + 2 * margin) + 0.5 - size / 2 - margin

    def wave(x: Tensor, y: Tensor) -> Tensor:
        return torch.sin(x / 5) + torch.cos(y / 7)

    y, x = torch.meshgrid(places, places, indexing="ij")
    inside = slice(margin, margin + size)
    found = turned(wave(x, y)[None, None], torch.tensor([angle]))[0, 0, inside, inside]
    cosine, sine = math.cos(angle), math.sin(angle)
    expected = wave(cosine * x - sine * y, sine * x + cosine * y)[inside, inside]
    assert (found - expected).abs().max() < 0.03  # linear between pixels, three times


def test_the_margin_is_enough_that_nothing_outside_is_read() -> None:
    for size, angle in ((16, 0.17), (224, 0.17), (32, 0.05)):
        margin = margin_of(angle, size)
        ones = torch.ones(2, 1, size + 2 * margin, size + 2 * margin)
        found = turned(ones, torch.tensor([angle, -angle]))
        assert (found[..., margin:-margin, margin:-margin] > 0.999).all()
