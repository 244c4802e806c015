"""Tensors too large for memory, in temporary files that vanish with the process."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from taming_dist.formats.files import writing


class Planes:
    """A tensor [c, h, w] in a temporary file without a name, written and read by rows.

    It is read and written, not mapped: mapped pages would count as memory of the process.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path) -> None:
        self.shape, self.dtype, self.folder = shape, dtype, folder
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (ours, while we live)

    def write(self, top: int, rows: Tensor) -> None:
        """Put rows [c, n, w] at `top`.

        Raises:
            UserError: the disk of the folder is full.
        """
        rows = rows.contiguous()
        with writing(self.folder):
            for offset, plane in self._places(top, rows):
                self._file.seek(offset)
                self._file.write(plane)
            self._file.flush()

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows [c, n, w] from `top` to before `bottom`."""
        channels, _, width = self.shape
        rows = torch.empty(channels, bottom - top, width, dtype=self.dtype)
        for offset, plane in self._places(top, rows):
            self._file.seek(offset)
            if self._file.readinto(plane) != len(plane):
                raise EOFError(f"rows {top} to {bottom} have not been written")
        return rows

    def _places(self, top: int, rows: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Where each channel of rows [c, n, w] lies in the file, and its bytes in memory."""
        _, height, width = self.shape
        row = width * self.dtype.itemsize
        for channel, plane in enumerate(rows.view(torch.uint8).flatten(1).numpy()):
            yield (channel * height + top) * row, memoryview(plane)
