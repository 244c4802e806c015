"""Differentiable augmentation of what the discriminator sees. Source: arXiv 2006.10738 (DiffAug).

Images in [-1, 1]; every policy reads its own columns of the draws, uniform on [0, 1), which are
arguments so that the result does not depend on the device or the rank. The same draws go to an
image and its reconstruction. Legend: b batch, c channels, h w pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

DRAWS = 7
SHIFT = 1 / 8  # largest translation, of a side
CUT = 1 / 2  # side of the hole, of a side


def diffaug(
    images: Float[Tensor, "b c h w"],
    draws: Float32[Tensor, "b 7"],
    policies: Sequence[str],
) -> Float[Tensor, "b c h w"]:
    """Apply the policies, named as in `POLICIES`, in the order given."""
    for name in policies:
        images = POLICIES[name](images, draws)
    return images


def color(
    images: Float[Tensor, "b c h w"], draws: Float32[Tensor, "b 7"]
) -> Float[Tensor, "b c h w"]:
    """Brightness +-0.5, saturation x 0 to 2, contrast x 0.5 to 1.5."""
    brightness, saturation, contrast = (draws[:, n, None, None, None] for n in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def translation(
    images: Float[Tensor, "b c h w"], draws: Float32[Tensor, "b 7"]
) -> Float[Tensor, "b c h w"]:
    """Shift by up to 1/8 of either side; grey (0) comes in."""
    h, w = images.shape[2:]
    rows = torch.arange(h, device=images.device) + _whole(draws[:, 3], -SHIFT * h, SHIFT * h)
    columns = torch.arange(w, device=images.device) + _whole(draws[:, 4], -SHIFT * w, SHIFT * w)
    padded = F.pad(images, (1, 1, 1, 1))  # a border of zeros: all that lies outside maps to it
    rows, columns = (rows + 1).clamp(0, h + 1), (columns + 1).clamp(0, w + 1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.movedim(1, 3)[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def cutout(
    images: Float[Tensor, "b c h w"], draws: Float32[Tensor, "b 7"]
) -> Float[Tensor, "b c h w"]:
    """A hole (0) of half of either side, its centre anywhere."""
    h, w = images.shape[2:]
    rows = _covered(h, draws[:, 5])
    columns = _covered(w, draws[:, 6])
    return images * ~(rows[:, :, None] & columns[:, None, :])[:, None]


POLICIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}


def _whole(draws: Float32[Tensor, "b"], low: float, high: float) -> Int64[Tensor, "b 1"]:
    """Uniform whole numbers from `low` to `high`, both included and rounded to zero."""
    first, last = int(low), int(high)
    return (first + (draws * (last - first + 1)).long())[:, None]


def _covered(side: int, draws: Float32[Tensor, "b"]) -> Bool[Tensor, "b {side}"]:
    """Which of `side` pixels a hole with a random centre covers."""
    length = int(CUT * side + 0.5)
    first = (draws * (side + (1 - length % 2))).long()[:, None] - length // 2
    pixels = torch.arange(side, device=draws.device)
    return (pixels >= first) & (pixels < first + length)
