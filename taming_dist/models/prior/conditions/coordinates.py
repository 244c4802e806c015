"""Where in its image a crop lies, as a map of coordinates: for large images from small windows."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.crops import crops_of, window_crops
from taming_dist.models.prior.conditions.interface import Codes, Columns, Condition, agreed
from taming_dist.models.prior.orders import Grid
from taming_dist.models.prior.window import Window
from taming_dist.ranges import check_ranges, ranged


@dataclass
class CoordinatesCondition(Condition):
    """One token for each place of the image's codes: which it is of all pixels, row by row.

    `steps`: 0 to 1 is rounded to the tokens 0 to `steps`. `grid` and `factor`, the pixels of a side
    of the image for each code, are those of the code shards. `vocabulary`: rows of the table; 0:
    one for every token. (The original has no row for the last one, which only images of about
    `steps` times `factor` pixels need; its checkpoints are read so.)

    Source: arXiv 2012.09841, section 4.3 ("coordinate conditioning"); the original's CoordStage.
    """

    steps: int = ranged(1024, at_least=1)
    grid: list[int] = ranged([], at_least=1, length=2, empty=True, from_data=True)
    factor: int = ranged(0, at_least=0, from_data=True)
    vocabulary: int = ranged(0, at_least=0)
    name: str = "coordinates"
    columns: ClassVar[tuple[str, ...]] = ("crop",)

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")
        self.vocabulary = self.vocabulary or self.steps + 1

    @property
    def length(self) -> int:
        return prod(self.grid)

    def part(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return the coordinates of crops [b, 5]; of whole images where none are given."""
        rows, across = self.grid
        found = coordinates(crops_of(count, columns), (rows, across), self.factor, self.steps)
        highest = int(found.max()) if found.numel() else 0
        if highest >= self.vocabulary:
            raise UserError(
                f"condition: an image has the coordinate {highest}, but the transformer knows 0 to "
                f"{self.vocabulary - 1}: use smaller images"
            )
        return found.flatten(1)

    def enlarged(self, window: Grid, image: Grid) -> "CoordinatesCondition":
        return replace(self, grid=list(image))

    def window(self, count: int, columns: Columns, window: Window) -> Columns:
        return {**columns, "crop": window_crops(count, columns, window)}

    def check(self) -> None:
        if not self.grid or not self.factor:
            raise UserError(
                f"model.condition.grid={list(self.grid)} and model.condition.factor={self.factor} "
                f"describe no codes: leave them out, they are those of the code shards"
            )

    def fitted(self, codes: Codes, spec: Any) -> "CoordinatesCondition":
        super().fitted(codes, spec)
        if len(codes.grid) < 2:
            raise UserError(
                f"model/condition=coordinates: the codes of {spec} are a sequence of "
                f"{codes.grid[0]} without a grid, use another condition"
            )
        grid = codes.grid[-2:]
        factor = self.factor if codes.image_size is None else codes.image_size // grid[0]
        if not factor:
            raise UserError(
                f"model.condition.factor: the codes of {spec} do not say of how many pixels they "
                f"are: give the factor of the VQGAN, such as 16"
            )
        facts = {"grid": list(grid), "factor": factor}
        return agreed(self, facts, "model.condition", spec)


def coordinates(
    crops: Float[Tensor, "b 5"], grid: tuple[int, int], factor: int, steps: int
) -> Int64[Tensor, "b i j"]:
    """Return the coordinate tokens, 0 to `steps`, of the codes of crops.

    Pixel k of an image of N has the coordinate k / N; the map is cropped and mirrored with the
    image, averaged over the `factor` x `factor` pixels of a code, and rounded. How many pixels the
    image has, and where the crop begins, follows from its shares.
    """
    left, top, width, height, mirrored = crops.double().unbind(1)
    rows, image_height = _pixels(top, height, grid[0], factor)
    columns, image_width = _pixels(left, width, grid[1], factor)
    across, down = image_width[:, None, None], image_height[:, None, None]
    places = (rows[:, :, None] * across + columns[:, None, :]) / (across * down)
    found = (places.clamp(0, 1) * steps).round().long()
    return torch.where(mirrored[:, None, None] > 0, found.flip(-1), found)


def _pixels(
    start: Float[Tensor, "b"], share: Float[Tensor, "b"], codes: int, factor: int
) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b"]]:
    """The mean pixel of each code of one side, and the pixels of that side of the image."""
    image = (codes * factor / share).round()
    within = torch.arange(codes, dtype=torch.float64) * factor + (factor - 1) / 2
    return (start * image).round()[:, None] + within, image
