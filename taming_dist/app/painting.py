"""What is painted on the page, as files that the sampling command reads: masks and label maps.

Canvases show a picture with squares of pixels for each of its own, so that small ones can be
painted on.
"""

import numpy as np
import torch
from torch import Tensor

from taming_dist.data.images import Shape
from taming_dist.errors import UserError
from taming_dist.generation.completion import whole_codes
from taming_dist.generation.pictures import to_uint8
from taming_dist.models.modalities import palette

CANVAS = 512  # pixels of the long side of a canvas, about
UNPAINTED = 255  # where a colour of the canvas is none of a class


def enlargement(shape: Shape) -> int:
    """How many pixels of a canvas make up one of a picture of a shape, along each side."""
    return max(1, CANVAS // max(shape))


def enlarged(picture: Tensor, times: int) -> np.ndarray:
    """A picture uint8 [3, h, w] as a canvas, uint8 [h * times, w * times, 3]."""
    pixels = picture.permute(1, 2, 0).cpu().numpy()
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def colours(classes: int) -> np.ndarray:
    """The colour of each class, uint8 [v, 3], as `LabelMap.picture` shows it."""
    return to_uint8(palette(classes)).numpy()


def hexadecimal(colour: np.ndarray) -> str:
    """A colour as the browser calls it."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def coloured(labels: np.ndarray, classes: int, times: int) -> np.ndarray:
    """A label map [h, w] as a canvas in the colours of its classes."""
    return colours(classes)[labels].repeat(times, axis=0).repeat(times, axis=1)


def label_map(canvas: np.ndarray, classes: int, shape: Shape) -> np.ndarray:
    """Return the label map uint8 [*shape] that a canvas, uint8 [h, w, 3], shows in the colours of
    its classes: of each pixel's square the class that most of it has. The browser softens the rims
    of strokes; such mixed colours count as what is beside them.

    Raises:
        UserError: there is hardly a colour of a class.
    """
    known = colours(classes).astype(np.int64) @ (65536, 256, 1)
    order = known.argsort()
    seen = canvas.astype(np.int64) @ (65536, 256, 1)
    found = order[np.searchsorted(known, seen, sorter=order).clip(max=classes - 1)]
    labels = np.where(known[found] == seen, found, UNPAINTED).astype(np.uint8)
    exact = known[found] == seen
    if not exact.any():
        raise UserError("label map: nothing is painted in the colour of a class: paint it first")
    return most_frequent(spread(labels, exact), classes, shape)


def spread(labels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Labels [h, w] with those that are not known taken from their neighbours, step by step."""
    labels, known = labels.copy(), known.copy()
    while not known.all():
        for axis in (0, 1):
            for by in (1, -1):
                near, is_known = np.roll(labels, by, axis), np.roll(known, by, axis)
                edge = [slice(None)] * 2
                edge[axis] = slice(0, 1) if by == 1 else slice(-1, None)
                is_known[tuple(edge)] = False  # it came around from the other side
                taken = is_known & ~known
                labels[taken], known[taken] = near[taken], True
    return labels


def most_frequent(labels: np.ndarray, classes: int, shape: Shape) -> np.ndarray:
    """Labels [h, w] in a smaller shape: of each square the class that most of it has."""
    high, wide = (side // own for side, own in zip(labels.shape, shape, strict=True))
    squares = labels[: high * shape[0], : wide * shape[1]].reshape(shape[0], high, shape[1], wide)
    counts = [(squares == each).sum((1, 3)) for each in range(classes)]
    return np.argmax(counts, axis=0).astype(np.uint8)


def kept_codes(painted: np.ndarray, factor: int, times: int) -> np.ndarray:
    """Return the mask uint8 [i, j] that `mask=` reads, a pixel for each code: black is kept, white,
    where anything in its square of a canvas [h, w] bool is painted, is sampled anew."""
    kept = whole_codes(torch.from_numpy(~painted), factor * times)
    return np.where(kept.numpy(), 0, 255).astype(np.uint8)
