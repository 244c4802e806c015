"""The memory that batches are decoded into: private, or shared between two processes.

The shared memory has no name: it is a file reachable only through its descriptors, so the system
frees it when both processes are gone, however they ended, and no limit of /dev/shm applies.
"""

import math
import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np

from taming_dist.data.images import COLUMNS


@dataclass(frozen=True)
class Rows:
    """The arrays of a batch: `columns` of `images.COLUMNS` [b, h, w(, 3)] by name, `classes` and
    `ids` int64 [b], `crops` fp64 [b, 5] (see `images.View.crop`)."""

    columns: dict[str, np.ndarray]
    classes: np.ndarray
    ids: np.ndarray
    crops: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """All of them."""
        return [*self.columns.values(), self.classes, self.ids, self.crops]

    def copy(self) -> "Rows":
        """A copy of the rows."""
        columns = {name: values.copy() for name, values in self.columns.items()}
        return Rows(columns, self.classes.copy(), self.ids.copy(), self.crops.copy())


@dataclass(frozen=True)
class Layout:
    """The shapes of a batch's arrays of square images, and their places in one buffer."""

    batch: int
    size: int
    columns: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """The bytes of a buffer for one batch."""
        return sum(self._sizes())

    def rows(self, buffer: memoryview) -> Rows:
        """The arrays of a batch in a buffer of that size."""
        arrays, start = [], 0
        for (dtype, shape), size in zip(self._arrays(), self._sizes(), strict=True):
            arrays.append(np.ndarray(shape, dtype, buffer, start))
            start += size
        ids, classes, crops, *columns = arrays
        return Rows(dict(zip(self.columns, columns, strict=True)), classes, ids, crops)

    def _arrays(self) -> list[tuple[np.dtype, tuple[int, ...]]]:
        arrays: list[tuple[type[np.generic], tuple[int, ...]]] = [
            (np.int64, (self.batch,)),
            (np.int64, (self.batch,)),
            (np.float64, (self.batch, 5)),
        ]
        square = (self.batch, self.size, self.size)
        columns = [COLUMNS[name] for name in self.columns]
        arrays += [(column.dtype, (*square, *column.depth)) for column in columns]
        return [(np.dtype(dtype), shape) for dtype, shape in arrays]

    def _sizes(self) -> list[int]:
        """The bytes of each array, rounded up to keep the next one aligned."""
        return [-(-dtype.itemsize * math.prod(s) // 64) * 64 for dtype, s in self._arrays()]


class Slots:
    """Buffers for `count` batches in memory that another process can map through `descriptor`."""

    def __init__(self, layout: Layout, count: int, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = _nameless_file()
            os.ftruncate(descriptor, layout.bytes * count)
        self.descriptor = descriptor
        view = memoryview(mmap.mmap(descriptor, layout.bytes * count))
        starts = range(0, layout.bytes * count, layout.bytes)
        self._layout = layout
        self._buffers = [view[start : start + layout.bytes] for start in starts]

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, number: int) -> Rows:
        """New arrays for each call: their holders can be told from those of earlier ones."""
        return self._layout.rows(self._buffers[number])


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("taming_dist")
    with tempfile.TemporaryFile() as file:  # not Linux: deleted from the start
        return os.dup(file.fileno())
