"""The first pictures of a run, made small while they pass, for the grid of all of them."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

SIDE = 512  # pixels that a picture in the grid has at most
GRID_COLUMNS = 10
GRID_IMAGES = 100


class Thumbnail:
    """A picture of `height` x `width` pixels, reduced by averages over squares if it is larger than
    `SIDE`, from strips uint8 [3, rows, width] that need not stay in memory."""

    def __init__(self, height: int, width: int) -> None:
        self.factor = min(math.ceil(max(height, width) / SIDE), height, width)
        self._sums = torch.zeros(3, height // self.factor, width // self.factor, dtype=torch.int64)
        self._row = 0

    def passing(self, strips: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pass the strips on, from top to bottom."""
        for strip in strips:
            self._add(strip)
            yield strip

    def _add(self, strip: Tensor) -> None:
        _, height, width = self._sums.shape
        columns = strip[:, :, : width * self.factor].unflatten(2, (width, self.factor))
        rows = (self._row + torch.arange(strip.shape[1])) // self.factor
        inside = rows < height
        self._sums.index_add_(1, rows[inside], columns.sum(3, dtype=torch.int64)[:, inside])
        self._row += strip.shape[1]

    def pixels(self) -> Tensor:
        """The small picture, uint8 [3, h, w]."""
        return (self._sums / self.factor**2).round().byte()


def reduced(picture: Tensor) -> Tensor:
    """A picture uint8 [3, h, w] that is in memory, made small."""
    small = Thumbnail(picture.shape[1], picture.shape[2])
    for _ in small.passing([picture]):
        pass
    return small.pixels()
