"""Rotary positions in two dimensions, from places in the grid.

Source: arXiv 2104.09864, section 3.2.2, and LlamaGen (arXiv 2406.06525, section 2.2.1) for two
dimensions. Legend: b batch, t positions, d width of a head.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

BASE = 10_000.0


def rotations(
    places: Int64[Tensor, "*b t"], columns: int, head_width: int
) -> Float32[Tensor, "*b t d"]:
    """Return cosines and sines of the angles by which the halves of a head are rotated: the first
    half of them by the row of a place in a grid of so many columns, the others by its column.

    A place of -1, in the prefix, is not rotated. `head_width`: d, a multiple of 4.
    """
    quarter = head_width // 4
    speeds = BASE ** (-torch.arange(quarter, device=places.device) / quarter)
    inside = places.clamp(min=0)
    where = torch.stack([inside // columns, inside % columns], dim=-1)
    angles = (where.unsqueeze(-1) * speeds).flatten(-2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotated(
    x: Float[Tensor, "b heads t d"], rotation: Float32[Tensor, "*b t d"]
) -> Float32[Tensor, "b heads t d"]:
    """Return the heads rotated by what `rotations` gave, in fp32."""
    cos, sin = rotation.unsqueeze(-3).chunk(2, dim=-1)
    one, other = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)
