"""What happens to the files of pictures: halves, holes, and faults of form only."""

import io
from typing import Any

import numpy as np
from PIL import Image

END = b"\xff\xd9"
# Smooth, as photographs are: their blocks have many zeros.
PIXELS = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (18, 24, 3), np.uint8)).resize(
        (192, 144), Image.Resampling.BICUBIC
    )
)


def encode(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(out, kind, **options)
    return out.getvalue()


def data_of(jpeg: bytes) -> int:
    """Where the coded data of the first scan start."""
    scan = jpeg.index(b"\xff\xda")
    return scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")


def cut(jpeg: bytes, share: float = 0.5) -> bytes:
    """The first part of a JPEG with an end mark, as a browser or a careful copy leaves it."""
    start = data_of(jpeg)
    return jpeg[: start + int(share * (len(jpeg) - start))] + END


def with_hole(jpeg: bytes, start: float, stop: float) -> bytes:
    """A JPEG in whose data a part is zeros, as on a failing disk."""
    first = data_of(jpeg)
    bounds = [first + int(share * (len(jpeg) - 2 - first)) for share in (start, stop)]
    return jpeg[: bounds[0]] + bytes(bounds[1] - bounds[0]) + jpeg[bounds[1] :]
