"""Conditions that are computed from an image when shards are made.

Coordinates are not among them: they depend on the crop, so they are computed when it is cut.
"""

import numpy as np
from PIL import Image

from taming_dist.errors import UserError

CANNY_SIGMA = 2.0  # pixels, as in the original's ImageNetEdges


def require_canny(asked: str = "--edges canny") -> None:
    """Raise `UserError` if scikit-image, which finds the edges, is not installed; `asked` is what
    needs it."""
    try:
        import skimage.feature  # noqa: F401
    except ImportError as error:
        raise UserError(f"{asked} needs scikit-image: pip install 'taming_dist[canny]'") from error


def canny_edges(pixels: np.ndarray) -> np.ndarray:
    """Edges of uint8 [h, w, 3] as 0 or 255, uint8 [h, w] (Canny 1986, sigma 2, on luma)."""
    from skimage.color import rgb2gray
    from skimage.feature import canny

    return canny(rgb2gray(pixels), sigma=CANNY_SIGMA).astype(np.uint8) * np.uint8(255)


def low_resolution(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Scale uint8 [h, w, 3] down by `factor` with an antialiased bicubic filter, rounding up."""
    height, width = pixels.shape[:2]
    shape = (-(-width // factor), -(-height // factor))
    return np.array(Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC))
