"""Square parts of a picture, resized: their geometry. Source: arXiv 2204.08583, section 3.2.

All of it is matrix products and gathers, whose gradients are the same each time on a GPU too; those
of torch's own resizing and sampling are not.
Legend: n cut-outs, c channels, h w pixels of the picture, p q pixels of a cut-out.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """Parts of a picture, fp32 [n] each, in its pixels: `top` and `left` edge, `height`, `width`;
    `flipped`, bool [n]: left and right are exchanged."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flipped: Tensor


def draw_boxes(
    shape: tuple[int, int],
    count: int,
    generator: torch.Generator,
    smallest: float = 0.3,
    power: float = 1.0,
    stretch: float = 0.0,
    flips: bool = True,
) -> Boxes:
    """Draw `count` squares within a picture of `shape` (h, w), on the generator's device.

    The side is a share of the picture's short side, from `smallest` to 1: uniform to the `power`,
    above 1 for more small ones. `stretch`: the largest logarithm by which width and height then
    differ, in opposite directions, about the square's middle.
    """

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device)

    height, width = shape
    side = min(shape) * (smallest + (1 - smallest) * uniform() ** power)
    middle_y = side / 2 + uniform() * (height - side)
    middle_x = side / 2 + uniform() * (width - side)
    ratio = torch.exp(stretch * (uniform() - 0.5))
    flipped = (uniform() < 0.5) & flips
    tall, wide = side * ratio, side / ratio
    return Boxes(middle_y - tall / 2, middle_x - wide / 2, tall, wide, flipped)


def cut_out(picture: Tensor, boxes: Boxes, size: int, margin: int = 0) -> Tensor:
    """The parts of a picture [1, c, h, w], each resized to `size` pixels and `margin` more around
    it, [n, c, size + 2 margin, size + 2 margin]. Beyond its edge the picture goes on as it ends.

    Bilinear, and averaged over what a pixel covers where the part is larger than `size`.
    """
    rows = taps(boxes.top, boxes.height, picture.shape[2], size, margin)
    columns = taps(boxes.left, boxes.width, picture.shape[3], size, margin)
    columns = torch.where(boxes.flipped[:, None, None], columns.flip(1), columns)
    across = torch.einsum("chw,nqw->ncqh", picture[0], columns)
    return torch.einsum("nph,ncqh->ncpq", rows, across)


def taps(start: Tensor, length: Tensor, pixels: int, size: int, margin: int) -> Tensor:
    """Weights [n, size + 2 margin, pixels] of the pixels of a line in those of its resized parts,
    which begin at `start` [n] and are `length` [n] pixels long: triangles of a width of two pixels
    of the coarser one of the two lines."""
    scale = (length / size)[:, None]
    numbers = torch.arange(-margin, size + margin, device=start.device)
    centres = (start[:, None] + (numbers + 0.5) * scale).clamp(0.5, pixels - 0.5)
    own = torch.arange(pixels, device=start.device) + 0.5
    weights = 1 - (own - centres[..., None]).abs() / scale.clamp_min(1)[..., None]
    weights = weights.clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)


def margin_of(angle: float, size: int) -> int:
    """How many pixels around a square of `size` turning it by up to `angle` (radians) reads."""
    a, b = math.tan(angle / 2), math.sin(angle)
    tall = 1 + b * (1 + a)
    wide = 1 + a * (1 + tall)
    return math.ceil(size / 2 * (max(tall, wide) - 1)) + bool(angle)


def turned(cutouts: Tensor, angles: Tensor) -> Tensor:
    """Cut-outs [n, c, p, p] turned about their middle by `angles` [n] (radians); what lies outside
    counts as 0.

    By three shears (Paeth, "A fast algorithm for general raster rotation", 1986).
    """
    places = torch.arange(cutouts.shape[-1], device=angles.device) + 0.5 - cutouts.shape[-1] / 2
    across = -torch.tan(angles / 2)[:, None] * places
    down = torch.sin(angles)[:, None] * places
    sheared = shifted(cutouts, across)
    sheared = shifted(sheared.mT, down).mT
    return shifted(sheared, across)


def shifted(images: Tensor, by: Tensor) -> Tensor:
    """Images [n, c, p, q] whose rows are moved to the left by `by` [n, p] pixels: the value at x is
    that at x + by, linear between pixels and 0 outside. The shifts get no gradient."""
    return _Shift.apply(images, by)


class _Shift(torch.autograd.Function):
    """The adjoint of a shift is the shift back: a gather, where torch's would be a scatter, whose
    sums depend on the order in which a GPU's threads come."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(by)
        return _shift(images, by)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (by,) = ctx.saved_tensors
        return _shift(gradient, -by), None


def _shift(images: Tensor, by: Tensor) -> Tensor:
    whole = by.floor()
    share = (by - whole)[:, None, :, None]
    places = torch.arange(images.shape[-1], device=by.device) + whole.long()[..., None]

    def tap(index: Tensor) -> Tensor:
        inside = (index >= 0) & (index < images.shape[-1])
        index = index.clamp(0, images.shape[-1] - 1)[:, None].expand_as(images)
        return images.gather(-1, index) * inside[:, None]

    return (1 - share) * tap(places) + share * tap(places + 1)
