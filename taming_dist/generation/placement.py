"""Where the window stands in a large image, and which codes can be chosen at the same time.

Source: arXiv 2012.09841, section 4.3, figure 3, and the original's make_samples. Legend: i j grid.
"""

from dataclasses import dataclass

import numpy as np

from taming_dist.errors import UserError
from taming_dist.models.prior.orders import Grid
from taming_dist.models.prior.window import Window

MOST_CODES = 2**24  # of an image; the numbers of all of them are in memory


def check_sides(size: tuple[int, int], factor: int) -> None:
    """UserError unless the sides (h, w) of an image, in pixels, are whole numbers of codes."""
    if any(side < factor or side % factor for side in size):
        near = "x".join(str(max(1, round(side / factor)) * factor) for side in size)
        raise UserError(
            f"size: the sides of {size[0]}x{size[1]} are not multiples of the VQGAN's {factor} "
            f"pixels, give {near}"
        )


@dataclass(frozen=True)
class Placement:
    """The windows of `sides` [i, j] codes through which an image of `image` [i, j] is written.

    While a code is chosen it is in the middle of its window, at row and column side // 2, or as
    near to that as the image's border allows. With a `step` above 1 the window moves by that many
    codes at once, in both directions, and a code is up to step - 1 places behind the middle.

    Raises:
        UserError: an image smaller than the window or of more than MOST_CODES codes, or a step that
            leaves the window's middle.
    """

    sides: Grid
    image: Grid
    step: int = 1

    def __post_init__(self) -> None:
        if any(whole < side for whole, side in zip(self.image, self.sides, strict=True)):
            raise UserError(
                f"size: {self.image[0]}x{self.image[1]} codes are too few for the transformer's "
                f"window of {self.sides[0]}x{self.sides[1]}: give a size of at least that"
            )
        if self.image[0] * self.image[1] > MOST_CODES:
            raise UserError(
                f"size: {self.image[0]}x{self.image[1]} codes are too many: give a size of at most "
                f"{MOST_CODES} codes"
            )
        most = min(side - side // 2 for side in self.sides)
        if not 1 <= self.step <= most:
            raise UserError(
                f"window_step: a window of {self.sides[0]}x{self.sides[1]} codes moves by 1 to "
                f"{most} of them at once, not by {self.step}"
            )

    @property
    def tops(self) -> np.ndarray:
        """The first row of the window of the codes in each row, int64 [i]."""
        return self._starts(0)

    @property
    def lefts(self) -> np.ndarray:
        """The first column of the window of the codes in each column, int64 [j]."""
        return self._starts(1)

    def _starts(self, axis: int) -> np.ndarray:
        side, whole = self.sides[axis], self.image[axis]
        moved = (np.arange(whole) - side // 2) // self.step * self.step
        return moved.clip(0, whole - side)

    def window(self, corner: int) -> Window:
        """Return the window whose upper left code has this place in the image."""
        return Window(*divmod(corner, self.image[1]), self.sides, self.image)

    @property
    def corners(self) -> np.ndarray:
        """The place of the upper left code of each code's window, int64 [i * j].

        Places are counted row by row.
        """
        return (self.tops[:, None] * self.image[1] + self.lefts).reshape(-1)

    @property
    def read(self) -> np.ndarray:
        """How many codes of its window are known when a code is chosen, row by row, those rows
        that are above it and what is on its left, int64 [i * j]."""
        rows, columns = (np.arange(side) for side in self.image)
        above = (rows - self.tops) * self.sides[1]
        return (above[:, None] + columns - self.lefts).reshape(-1)

    @property
    def widest(self) -> int:
        """The most codes of a wave."""
        return max(wave.size for wave in self.waves())

    def waves(self) -> list[np.ndarray]:
        """Return the places of all codes in waves: none reads a code of its own wave or a later
        one, so those of a wave can be chosen together.

        A code reads the one on its left, and of the row above what its window shows; what is
        further up, that row has read already.
        """
        columns, last = np.arange(self.image[1]), self.lefts + self.sides[1] - 1
        rows = []
        above = np.full_like(columns, -1)
        for _ in range(self.image[0]):
            # wave[j] = 1 + max(above[j], wave[j - 1])
            rows.append(np.maximum.accumulate(above + 1 - columns) + columns)
            above = rows[-1][last]
        wave = np.concatenate(rows)
        return np.split(wave.argsort(kind="stable"), np.bincount(wave).cumsum()[:-1])
