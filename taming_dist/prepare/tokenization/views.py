"""The crops of an image that are encoded; several views replace augmentation, which codes lack.

All views are cut from one centre square that the reader delivers, images and label maps alike.
Their places can be stored beside their codes.
Class-conditional transformers on ImageNet are commonly trained on ten crops (four corners and the
centre, each also mirrored) from a slightly larger square.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from taming_dist.data.order import PIXELS, random_words
from taming_dist.errors import UserError

# How much larger the square is than a crop where crops have different places.
ENLARGEMENT = 1.1


class Views(ABC):
    """The views of a job: their `names`, and the sides in pixels of the views (`size`) and of the
    square that they are cut from (`square`)."""

    names: list[str]

    def __init__(self, size: int, square: int) -> None:
        self.size, self.square = size, square

    @abstractmethod
    def places(self, ids: Tensor) -> np.ndarray:
        """Left and top of each view in its square, and 1 if it is mirrored: int64 [b, views, 3].

        `ids` [b] are those of the samples; a mirrored view is cut first, then mirrored.
        """

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """Yield each view [b, ..., size, size] of squares [b, ..., square, square] of samples ids.

        There may be any dimensions after b; label maps are cut as their images are.
        """
        for places in self.places(ids).swapaxes(0, 1):
            rows = zip(squares, places, strict=True)
            yield torch.stack([self._crop(square, place) for square, place in rows])

    def crops(self, squares: np.ndarray, ids: Tensor) -> np.ndarray:
        """The places of the views in their images, fp64 [b, views, 5].

        Both `squares` [b, 5], which must not be mirrored, and the result are left, top, width,
        height as fractions of the image, and 1 if mirrored.
        """
        assert not squares[:, 4].any()
        places = self.places(ids)
        corners, extents = squares[:, None, :2], squares[:, None, 2:4]
        starts = corners + extents * (places[..., :2] / self.square)
        sides = np.broadcast_to(extents * (self.size / self.square), starts.shape)
        # Rounding must not push a view over the edge of its image.
        shares = np.clip(np.concatenate([starts, sides], 2), 0, 1)
        return np.concatenate([shares, places[..., 2:]], 2)

    def _crop(self, squares: Tensor, place: np.ndarray) -> Tensor:
        left, top, mirrored = place.tolist()
        view = squares[..., top : top + self.size, left : left + self.size]
        return view.flip(-1) if mirrored else view


class _SameForAll(Views):
    """Views whose places are the same for all samples: `table` [views, 3], see `places`."""

    table: list[tuple[int, int, int]]

    def places(self, ids: Tensor) -> np.ndarray:
        """See `Views`."""
        table = np.array(self.table, np.int64)
        return np.broadcast_to(table, (len(ids), *table.shape))

    def cut(self, squares: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """See `Views`."""
        for place in self.table:
            yield self._crop(squares, np.array(place))


class Center(_SameForAll):
    """The whole square."""

    names = ["center"]
    table = [(0, 0, 0)]

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


class Flip(_SameForAll):
    """The whole square, as it is and mirrored."""

    names = ["center", "flipped"]
    table = [(0, 0, 0), (0, 0, 1)]

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


class TenCrop(_SameForAll):
    """Corners and centre of a square 1.1 times as large, then the same mirrored."""

    _corners = ["top left", "top right", "bottom left", "bottom right", "center"]
    names = _corners + [f"{corner} flipped" for corner in _corners]

    def __init__(self, size: int) -> None:
        super().__init__(size, enlarged(size))
        far = self.square - self.size
        corners = [(0, 0), (far, 0), (0, far), (far, far), (far // 2, far // 2)]
        # A flipped crop is the mirror image of the crop of the same name.
        self.table = [(left, top, mirrored) for mirrored in (0, 1) for left, top in corners]


class RandomCrops(Views):
    """Crops at random places of a square 1.1 times as large, half of them mirrored.

    Place and mirroring are a function of the seed, the sample's id and the number of the view.
    """

    def __init__(self, size: int, count: int, seed: int) -> None:
        super().__init__(size, enlarged(size))
        self.seed = seed
        self.names = [f"random {number} of seed {seed}" for number in range(count)]

    def places(self, ids: Tensor) -> np.ndarray:
        """See `Views`."""
        numbers = range(len(self.names))
        found = [[self._place(number, sample) for number in numbers] for sample in ids.tolist()]
        return np.array(found, np.int64).reshape(len(ids), len(self.names), 3)

    def _place(self, number: int, sample: int) -> tuple[int, int, int]:
        words = [int(w) for w in random_words(self.seed, PIXELS, number, sample, count=3)]
        places = self.square - self.size + 1
        # The high bits of a word scaled to the range: no division, no measurable bias.
        top, left = (word * places >> 64 for word in words[:2])
        return left, top, words[2] >> 63


VIEWS = ("center", "flip", "ten-crop", "random")


def build_views(name: str, size: int, count: int, seed: int) -> Views:
    """Build the views `name` of VIEWS with crops of `size` pixels; `count`, `seed`: of `random`.

    Raises:
        UserError: if the count or seed is out of range.
    """
    if name != "random":
        plain: dict[str, type[Center] | type[Flip] | type[TenCrop]]
        plain = {"center": Center, "flip": Flip, "ten-crop": TenCrop}
        return plain[name](size)
    if count < 1:
        raise UserError(f"--crops is {count} but must be at least 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed is {seed} but must be between 0 and 2^64 - 1")
    return RandomCrops(size, count, seed)


def enlarged(size: int) -> int:
    """The side of the square from which crops of `size` pixels at different places are cut."""
    return round(size * ENLARGEMENT)
