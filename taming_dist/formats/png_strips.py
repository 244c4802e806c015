"""PNG files of pictures that come in strips of rows and are never in memory as a whole.

Source: Portable Network Graphics (W3C recommendation, second edition), sections 5, 9, 11 and 12.8.
"""

import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import numpy as np
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = 3


def write_png_strips(
    strips: Iterable[Tensor], size: tuple[int, int], file: BinaryIO, texts: Mapping[str, str]
) -> None:
    """Write a picture of `size` (h, w) that comes as strips [3, n, w] uint8 from the top, with
    texts by keyword."""
    height, width = size
    file.write(SIGNATURE)
    file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
    for keyword, text in texts.items():
        file.write(chunk(b"iTXt", keyword.encode("latin-1") + bytes(5) + text.encode()))
    packer = zlib.compressobj()
    above = np.zeros((1, CHANNELS * width), np.uint8)
    for strip in strips:
        rows = strip.permute(1, 2, 0).reshape(strip.shape[1], -1).cpu().numpy()
        packed = packer.compress(filtered(rows, above).tobytes())
        if packed:
            file.write(chunk(b"IDAT", packed))
        above = rows[-1:]
    file.write(chunk(b"IDAT", packer.flush()))
    file.write(chunk(b"IEND", b""))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk: length, type, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def filtered(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Return rows [n, bytes] uint8 as the number of each one's filter and what the filter leaves.

    `above` [1, bytes] is the row before the first. Each row has the filter that leaves the smallest
    sum of absolute differences.
    """
    up = np.concatenate([above, rows[:-1]])
    left, corner = (np.pad(each, ((0, 0), (CHANNELS, 0)))[:, :-CHANNELS] for each in (rows, up))
    mean = ((left.astype(np.uint16) + up) // 2).astype(np.uint8)
    guesses = (np.zeros_like(rows), left, up, mean, paeth(left, up, corner))
    found = np.stack([rows - guess for guess in guesses])  # modulo 256
    best = np.abs(found.view(np.int8).astype(np.int16)).sum(2, dtype=np.int64).argmin(0)
    chosen = found[best, np.arange(len(rows))]
    return np.concatenate([best.astype(np.uint8)[:, None], chosen], 1)


def paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Return whichever of the three neighbours is nearest to left + up - corner."""
    a, b, c = (each.astype(np.int16) for each in (left, up, corner))
    to_left, to_up, to_corner = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    nearest_left = (to_left <= to_up) & (to_left <= to_corner)
    return np.where(nearest_left, left, np.where(to_up <= to_corner, up, corner))
