"""The codes of a second VQGAN: segmentation, depth, edges, low resolution, pose."""

from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any, ClassVar

from jaxtyping import Int64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.interface import (
    Codes,
    Columns,
    Condition,
    Request,
    agreed,
)
from taming_dist.models.prior.orders import Grid, is_code_shape
from taming_dist.models.prior.window import Window
from taming_dist.ranges import check_ranges, marked, ranged


@dataclass
class CodesCondition(Condition):
    """The codes that a second VQGAN gives a label map, a depth map or the like, row by row, and of
    several grids one after the other.

    Vocabulary, `grid` (the shape of an image's codes) and fingerprint are those of the second
    VQGAN's codes; left out, they are as the code shards say. Source: arXiv 2012.09841, section 3.2,
    "conditioned synthesis".
    """

    vocabulary: int = ranged(0, at_least=0, from_data=True)
    grid: list[int] = ranged([], at_least=1, empty=True, from_data=True)
    fingerprint: str = marked("", compared=False)
    name: str = "codes"
    columns: ClassVar[tuple[str, ...]] = ("cond",)

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")

    @property
    def length(self) -> int:
        return prod(self.grid)

    def part(self, count: int, columns: Columns) -> Int64[Tensor, "{count} m"]:
        """Return codes [b, *grid] as prefix of as many tokens."""
        given = columns.get("cond")
        if given is None:
            raise UserError(
                "condition: this transformer is conditioned on the codes of a second VQGAN, give "
                "code shards that have them (tools/tokenize_dataset.py --condition-model), or "
                "pictures, condition=PICTURE condition_vqgan=EXPORT"
            )
        if given.shape != (count, *self.grid):
            raise UserError(
                f"condition: {count} images need codes of the grid {list(self.grid)}, not "
                f"{list(given.shape)}"
            )
        # on a device they were made there, by a VQGAN of this vocabulary: to look would be to wait
        looked_at = given.numel() and given.device.type == "cpu"
        if looked_at and not 0 <= int(given.min()) <= int(given.max()) < self.vocabulary:
            raise UserError(f"condition: a code is outside of 0 to {self.vocabulary - 1}")
        return given.long().flatten(1)

    def enlarged(self, window: Grid, image: Grid) -> "CodesCondition":
        """Its grid is to that of the image as it was in training."""
        if len(self.grid) != 2:
            raise UserError(
                f"size: the condition's codes have the shape {list(self.grid)}, and only a grid of "
                f"them is known for larger images: leave size out"
            )
        sides = []
        for own, side, whole in zip(self.grid, window, image, strict=True):
            if whole * own % side:
                raise UserError(
                    f"size: {whole} codes of a side have no condition, which has {own} codes for "
                    f"{side}: give a multiple of {side // gcd(own, side)} codes"
                )
            sides.append(whole * own // side)
        return replace(self, grid=sides)

    def window(self, count: int, columns: Columns, window: Window) -> Columns:
        """Return the codes at the window's place, in proportion, rounded towards the start."""
        rows, across = self.grid
        top, left = window.top * rows // window.sides[0], window.left * across // window.sides[1]
        codes = columns["cond"][:, top : top + rows, left : left + across]
        return {**columns, "cond": codes}

    def requested(self, request: Request) -> Columns:
        """The codes of pictures, or else those of code shards."""
        if request.encode_pictures is None or request.class_id is not None:
            return super().requested(request)
        return {"cond": request.encode_pictures(request.images)}

    def check(self) -> None:
        if not is_code_shape(self.grid) or self.vocabulary < 1:
            raise UserError(
                f"model.condition.grid={list(self.grid)} and model.condition.vocabulary="
                f"{self.vocabulary} describe no codes: leave them out, they are those of the code "
                f"shards"
            )

    def fitted(self, codes: Codes, spec: Any) -> "CodesCondition":
        found = codes.condition
        if found is None:
            raise UserError(
                f"model/condition=codes, but {spec} has codes of images only: make "
                f"them with tools/tokenize_dataset.py --condition-model EXPORT"
            )
        facts = {"vocabulary": found["vocab"], "grid": list(found["grid"])}
        return agreed(self, facts | {"fingerprint": found["fingerprint"]}, "model.condition", spec)
