"""Images of a model as pictures: bytes per pixel, and many of them as one grid."""

import torch.nn.functional as F
from torch import Tensor

WHITE = 255
GAP = 2


def to_uint8(images: Tensor) -> Tensor:
    """Return images [b, 3, h, w] from [-1, 1] (clamped) as uint8, rounded to the nearest level."""
    return (images.clamp(-1, 1) + 1).mul(127.5).round().byte()


def image_grid(pictures: Tensor, columns: int) -> Tensor:
    """Return pictures [b, c, h, w] uint8 row by row as one white grid [c, rows, width] uint8.

    Pictures stand `GAP` pixels apart; an unfinished last row is filled up with white ones.
    """
    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    framed = F.pad(pictures, (0, GAP, 0, GAP), value=WHITE)
    framed = F.pad(framed, (0, 0, 0, 0, 0, 0, 0, missing), value=WHITE)
    rows = framed.unflatten(0, (-1, columns))
    joined = rows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return joined[:, :-GAP, :-GAP]
