"""Codes of an image at several scales, coarse to fine: where they lie, and between two scales.

Scales are the sides of square grids, [1, 2, 4] for 1 + 4 + 16 codes, of which the last is that of
the latents. Source: arXiv 2404.02905, section 3.2.
Legend: b batch, d channels, i j grid, n codes of all scales.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.resizing import resized, resizing

Scales = tuple[int, ...]


def check_scales(key: str, scales: Sequence[int]) -> None:
    """UserError unless the scales begin with 1 and grow."""
    ascending = all(one < other for one, other in zip(scales, scales[1:], strict=False))
    if not scales or scales[0] != 1 or not ascending:
        raise UserError(
            f"{key}={list(scales)}: use ascending sides from 1 up to that of the latents, such as "
            f"[1,2,4,8]"
        )


def counts(scales: Sequence[int]) -> list[int]:
    """How many codes each scale has."""
    return [side * side for side in scales]


def starts(scales: Sequence[int]) -> list[int]:
    """The first code of each scale, and at the end how many codes there are."""
    return [0, *accumulate(counts(scales))]


def smaller(x: Float[Tensor, "b d i i"], side: int) -> Float[Tensor, "b d side side"]:
    """A square grid brought down to a side: each number is the mean of the area that it covers."""
    return resized(x, (side, side), "area")


def larger(x: Float[Tensor, "b d i i"], side: int) -> Float[Tensor, "b d side side"]:
    """A square grid brought up to a side by bicubic interpolation."""
    return resized(x, (side, side), "bicubic")


@cache
def mixing(scales: Scales, device: torch.device) -> Float32[Tensor, "after before"]:
    """What the codes of all scales but the first are told of those before: a weight for each code
    (n - 1 of them) of each code that is not of the last scale. It is that of summing up all smaller
    scales at the size of the last (`larger`), and bringing the sum down (`smaller`)."""
    last, begin = scales[-1], starts(scales)
    with torch.inference_mode(False):
        weights = torch.zeros(begin[-1] - 1, begin[-2], device=device)
        for k, side in enumerate(scales[1:], 1):
            down = resizing(last, side, "area", device)
            for earlier, own in enumerate(scales[:k]):
                axis = down @ resizing(own, last, "bicubic", device)
                rows = slice(begin[k] - 1, begin[k + 1] - 1)
                weights[rows, begin[earlier] : begin[earlier + 1]] = torch.kron(axis, axis)
        return weights


@cache
def visible(scales: Scales, prefix: int, device: torch.device) -> Bool[Tensor, "t t"]:
    """Which positions each one sees, of a prefix and of what stands for the codes after the first:
    all of the prefix, and all scales up to its own."""
    with torch.inference_mode(False):
        blocks = torch.tensor([prefix, *counts(scales)[1:]])
        block = torch.arange(len(blocks)).repeat_interleave(blocks).to(device)
        return block[:, None] >= block[None]


@cache
def centres(scales: Scales, device: torch.device) -> Int64[Tensor, "n"]:
    """The place, in the grid of the last scale row by row, in which each code has its centre."""
    last = scales[-1]
    with torch.inference_mode(False):
        sides = [(2 * torch.arange(side) + 1) * last // (2 * side) for side in scales]
        places = [(axis[:, None] * last + axis).flatten() for axis in sides]
        return torch.cat(places).to(device)
