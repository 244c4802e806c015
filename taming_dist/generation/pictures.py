"""Images of a model as pictures: bytes per pixel, and many of them as one grid."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WHITE = 255
GAP = 2


def to_uint8(images: Tensor) -> Tensor:
    """Return images [b, 3, h, w] from [-1, 1] (clamped) as uint8, rounded to the nearest level."""
    return (images.clamp(-1, 1) + 1).mul(127.5).round().byte()


def image_grid(pictures: Tensor, columns: int) -> Tensor:
    """Return pictures [b, c, h, w] uint8 row by row as one white grid [c, rows, width] uint8.

    Pictures stand `GAP` pixels apart; an unfinished last row is filled up with white ones.
    """
    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    framed = F.pad(pictures, (0, GAP, 0, GAP), value=WHITE)
    framed = F.pad(framed, (0, 0, 0, 0, 0, 0, 0, missing), value=WHITE)
    rows = framed.unflatten(0, (-1, columns))
    joined = rows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return joined[:, :-GAP, :-GAP]


def beside_given(
    pictures: Sequence[Tensor], given: Callable[[int], Sequence[Tensor]], period: int, most: int
) -> tuple[list[Tensor], int]:
    """Return pictures [c, h, w] uint8 in the order of a grid, and how many columns it has, at most
    `most`: what was given for them, `given(k)` for picture k, stands before those made of it.

    Pictures k and k + `period` were made of the same. Where nothing is given, a period is a row.
    """
    ahead = len(given(0))
    if period == 1:
        found = [*given(0), *pictures]
        return found, min(most, math.ceil(math.sqrt(len(found))))
    if not ahead:
        return list(pictures), _columns(len(pictures), period, most)
    groups = [[*given(k), *pictures[k::period]] for k in range(min(period, len(pictures)))]
    width = min(most, len(groups[0]))  # the first ones have most pictures
    blank = torch.full_like(pictures[0], WHITE)
    padded = [(group + [blank] * width)[:width] for group in groups]
    return [each for group in padded for each in group], width * min(len(groups), most // width)


def _columns(count: int, period: int, most: int) -> int:
    return period if period <= most else min(most, math.ceil(math.sqrt(count)))
