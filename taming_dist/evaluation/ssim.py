"""Structural similarity of two images.

Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
structural similarity", 2004, equation 13 with its Gaussian window of 11 pixels and its constants.

Legend: b batch, c channels, h w pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, DEVIATION = 11, 1.5  # pixels
LUMINANCE, CONTRAST = 0.01**2, 0.03**2  # for pixels in [0, 1]


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Return the similarity [b], at most 1, of images [b, c, h, w] in [0, 1]: the mean over
    channels and over the pixels around which the window fits; h and w are at least `WINDOW`."""
    images = torch.stack([one, other, one * one, other * other, one * other]).double()
    mean, mean_of_other, *products = blurred(images.flatten(0, 2)).unflatten(0, (5, *one.shape[:2]))
    squares = mean.square() + mean_of_other.square()
    both = mean * mean_of_other
    variances = products[0] + products[1] - squares
    covariance = products[2] - both
    similar = (2 * both + LUMINANCE) * (2 * covariance + CONTRAST)
    return (similar / ((squares + LUMINANCE) * (variances + CONTRAST))).mean((1, 2, 3))


def blurred(images: Tensor) -> Tensor:
    """Images [n, h, w] under the window, where it fits: [n, h - 10, w - 10]."""
    places = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * DEVIATION**2))
    weights = weights / weights.sum()
    rows = F.conv2d(images[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))[:, 0]
