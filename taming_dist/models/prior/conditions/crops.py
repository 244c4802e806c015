"""Which part of its image a sample shows, for conditions that depend on it.

A crop is left, top, width, height as shares of the image, and 1 if what it shows is mirrored
afterwards: the column `crop` of code shards. Legend: b images.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions.interface import Columns
from taming_dist.models.prior.window import Window

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


def window_crops(count: int, columns: Columns, window: Window) -> Float64[Tensor, "{count} 5"]:
    """Return the crops that a window of the images shows, which are themselves those of `columns`.

    Raises:
        UserError: as `crops_of` does.
    """
    crops = crops_of(count, columns)
    starts, sides, mirrored = crops[:, :2], crops[:, 2:4], crops[:, 4:]
    left, top, width, height = window.crop
    seen = torch.tensor([[left, top]], dtype=torch.float64).repeat(count, 1)
    # what is seen is mirrored after it was cut
    seen[:, :1] = torch.where(mirrored > 0, 1 - left - width, left)
    shares = torch.tensor([[width, height]], dtype=torch.float64)
    return torch.cat([starts + seen * sides, sides * shares, mirrored], dim=1)
