"""Resizing of images by two products of matrices: its gradient is the same every time, also on
GPUs, where that of `F.interpolate` adds up in any order.

Legend: b batch, c channels, h w pixels.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.exact import without_autocast


def resized(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Images [b,c,h,w] in fp32 as `F.interpolate` resizes them to `size` in this mode: area,
    bicubic, or bilinear, which is antialiased."""
    if images.shape[2:] == size:
        return images
    rows, columns = (
        resizing(length, side, mode, images.device)
        for length, side in zip(images.shape[2:], size, strict=True)
    )
    with without_autocast(images.device):
        return rows @ images @ columns.T


@cache
def resizing(length: int, side: int, mode: str, device: torch.device) -> Tensor:
    """The matrix [side,length] that resizes one axis."""
    with torch.inference_mode(False), torch.no_grad():
        impulses, antialias = torch.eye(length)[None, None], mode == "bilinear"
        matrix = F.interpolate(impulses, (side, length), mode=mode, antialias=antialias)[0, 0]
        return to_device(matrix, device)
