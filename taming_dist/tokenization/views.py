"""Which crops of an image are encoded: several views make up for the augmentation that codes lack.

All views are cut from one centre square that the reader delivers, images and label maps alike.
Ten crops (four corners and the centre, each also mirrored) from a slightly larger square are how
class-conditional transformers on ImageNet are commonly trained.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from taming_dist.data.order import PIXELS, random_words
from taming_dist.errors import UserError

# How much larger the square is than a crop, where crops differ in place.
ENLARGEMENT = 1.1


class Views(Protocol):
    """The views of a job: their `names`, the side of the `square` they are cut from, in pixels."""

    names: list[str]
    square: int

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """Yield each view [b, ..., size, size] of squares [b, ..., square, square] of samples ids.

        Any leading dimensions after b; what is a label map is cut as its image is.
        """
        ...


class Center:
    """The whole square."""

    names = ["center"]

    def __init__(self, size: int) -> None:
        self.square = size

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """See `Views`."""
        yield squares


class Flip:
    """The whole square, and mirrored."""

    names = ["center", "flipped"]

    def __init__(self, size: int) -> None:
        self.square = size

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """See `Views`."""
        yield squares
        yield squares.flip(-1)


class TenCrop:
    """Corners and centre of a square 1.1 times as large, then the same mirrored."""

    places = ["top left", "top right", "bottom left", "bottom right", "center"]
    names = places + [f"{place} flipped" for place in places]

    def __init__(self, size: int) -> None:
        self.size, self.square = size, enlarged(size)

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """See `Views`."""
        far = self.square - self.size
        corners = [(0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)]
        # Mirrored, the left crop is the mirror image of the left crop, as its name says.
        for mirrored in (False, True):
            for top, left in corners:
                view = squares[..., top : top + self.size, left : left + self.size]
                yield view.flip(-1) if mirrored else view


class RandomCrops:
    """Crops at random places of a square 1.1 times as large, half of them mirrored.

    Place and mirroring are a function of the seed, the sample's id and the number of the view.
    """

    def __init__(self, size: int, count: int, seed: int) -> None:
        self.size, self.square, self.seed = size, enlarged(size), seed
        self.names = [f"random {number} of seed {seed}" for number in range(count)]

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """See `Views`."""
        for number in range(len(self.names)):
            rows = zip(squares, ids.tolist(), strict=True)
            yield torch.stack([self._crop(square, number, sample) for square, sample in rows])

    def _crop(self, square: Tensor, number: int, sample: int) -> Tensor:
        words = [int(w) for w in random_words(self.seed, PIXELS, number, sample, count=3)]
        places = self.square - self.size + 1
        # The high bits of a word scaled to the range: no division, no bias that could be seen.
        top, left = (word * places >> 64 for word in words[:2])
        view = square[..., top : top + self.size, left : left + self.size]
        return view.flip(-1) if words[2] >> 63 else view


VIEWS = ("center", "flip", "ten-crop", "random")


def build_views(name: str, size: int, count: int, seed: int) -> Views:
    """The views called `name` in VIEWS, crops of `size` pixels; `count` and `seed` are random's.

    Raises:
        UserError: a count or seed that there is not.
    """
    if name != "random":
        plain: dict[str, type[Center] | type[Flip] | type[TenCrop]]
        plain = {"center": Center, "flip": Flip, "ten-crop": TenCrop}
        return plain[name](size)
    if count < 1:
        raise UserError(f"--crops is {count} but must be at least 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed is {seed} but must be in 0 .. 2^64 - 1")
    return RandomCrops(size, count, seed)


def enlarged(size: int) -> int:
    """The side of the square from which crops of `size` pixels are cut at different places."""
    return round(size * ENLARGEMENT)
