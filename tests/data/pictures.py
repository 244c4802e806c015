"""Small pictures for tests of reading."""

import io

import numpy as np
from PIL import Image


def jpeg(number: int, size: tuple[int, int] = (8, 12)) -> bytes:
    """A JPEG of random pixels, h x w, the same for the same number."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()
