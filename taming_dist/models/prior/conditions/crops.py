"""Which part of its image a sample shows, for conditions that depend on it.

A crop is left, top, width, height as shares of the image, and 1 if what it shows is mirrored
afterwards: the column `crop` of code shards. Legend: b images.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.interface import Columns

WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)
TOLERANCE = 1e-6  # of shares that are stored in fp32


def crops_of(count: int, columns: Columns) -> Float64[Tensor, "{count} 5"]:
    """Return the column `crop`; whole images where there is none.

    Raises:
        UserError: there is another number of them, or one reaches outside of its image.
    """
    crops = columns.get("crop")
    if crops is None:
        return torch.tensor([WHOLE], dtype=torch.float64).expand(count, -1)
    if crops.shape != (count, 5):
        raise UserError(f"condition: {count} images need crops [{count}, 5], not {[*crops.shape]}")
    starts, sides = crops[:, :2], crops[:, 2:4]
    inside = (starts >= 0) & (sides > 0) & (starts + sides <= 1 + TOLERANCE)
    if not inside.all():
        wrong = crops[~inside.all(1)][0, :4].tolist()
        raise UserError(
            f"condition: the crop {wrong} reaches outside of its image: left, top, width and "
            f"height are shares of it, from 0 to 1"
        )
    return crops.double()


def window_crop(
    top: int, left: int, window: tuple[int, int], image: tuple[int, int]
) -> Float[Tensor, "5"]:
    """Return the crop that a window of an image's codes shows.

    The window [i, j] has its upper left code at row `top`, column `left` of the image's [i, j].
    """
    (rows, columns), (all_rows, all_columns) = window, image
    return torch.tensor(
        [left / all_columns, top / all_rows, columns / all_columns, rows / all_rows, 0.0]
    )
