"""A window of an image's codes: as large as the grid that the transformer has learned.

Source: arXiv 2012.09841, section 4.3 and figure 3. Legend: i j code grid.
"""

from typing import NamedTuple

from taming_dist.models.prior.orders import Grid


class Window(NamedTuple):
    """The window of `sides` [i, j] codes, of an `image` of [i, j] codes, whose upper left code is
    at the image's row `top` and column `left`."""

    top: int
    left: int
    sides: Grid
    image: Grid

    @property
    def crop(self) -> tuple[float, float, float, float]:
        """Left, top, width, height as shares of the image."""
        rows, columns = self.image
        height, width = self.sides
        return self.left / columns, self.top / rows, width / columns, height / rows
