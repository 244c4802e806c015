"""npz files as ADM's suite has them (arXiv 2105.05233): images in `arr_0`, statistics in `mu` and
`sigma`. They are read as a stream, and nothing in them is unpickled."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from taming_dist.errors import UserError
from taming_dist.formats.names import printable
from taming_dist.formats.npy import DAMAGE

IMAGES = "arr_0.npy"
PIECE = 2**24  # bytes of a file that are hashed at once
ENCRYPTED = 1  # of the flags of a zip's entry
# NotImplementedError: compressed in a way that Python lacks
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, IsADirectoryError, NotImplementedError)


@dataclass(frozen=True)
class Rows:
    """The rows of the images of a file, uint8 `shape` [n, h, w, 3]."""

    key: str
    path: Path
    shape: tuple[int, ...]

    @classmethod
    def open(cls, key: str, path: Path) -> "Rows":
        """Those of a file that `key=` names; `UserError` if it has none."""
        with reading(key, path) as archive:
            return rows_of(key, path, archive)

    @property
    def fingerprint(self) -> str:
        """The hash of the file."""
        return file_hash(self.path)

    def every(self, first: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every `step`-th row [h, w, 3] from `first` on, with its number."""
        size = int(np.prod(self.shape[1:]))
        with reading(self.key, self.path) as archive, archive.open(IMAGES) as file:
            header(file)
            for number in range(self.shape[0]):
                data = file.read(size)
                if len(data) != size:
                    raise UserError(f"{self.key}: {printable(str(self.path))} is truncated")
                if number % step == first:
                    yield number, np.frombuffer(data, np.uint8).reshape(self.shape[1:])


@dataclass(frozen=True)
class Contents:
    """What a file has: its images, or the statistics `mu` [d] and `sigma` [d, d] of images that it
    may lack, or both; `spatial`: those of sFID, `mu_s` and `sigma_s` in the file."""

    rows: Rows | None
    statistics: dict[str, np.ndarray] | None
    spatial: dict[str, np.ndarray] | None = None

    @classmethod
    def open(cls, key: str, path: Path, dim: int, spatial_dim: int) -> "Contents":
        """Those of a file that `key=` names, whose statistics are of `dim` and
        `spatial_dim` features.

        Raises:
            UserError: it has neither, they are others, or it cannot be read.
        """
        with reading(key, path) as archive:
            found = statistics_of(key, path, archive, dim)
            spatial = statistics_of(key, path, archive, spatial_dim, "_s")
            has_images = found is None or IMAGES in archive.namelist()
            return cls(rows_of(key, path, archive) if has_images else None, found, spatial)


def rows_of(key: str, path: Path, archive: zipfile.ZipFile) -> Rows:
    """The images of an open file; `UserError` if it has none."""
    if IMAGES not in archive.namelist():
        raise UserError(f"{key}: {printable(str(path))} has no {IMAGES[:-4]}, of images")
    with archive.open(IMAGES) as file:
        shape = header(file)
    if len(shape) != 4 or shape[3] != 3 or not all(shape):
        raise UserError(f"{key}: {IMAGES[:-4]} of {printable(str(path))} is not uint8 [n, h, w, 3]")
    return Rows(key, path, shape)


def statistics_of(
    key: str, path: Path, archive: zipfile.ZipFile, dim: int, ending: str = ""
) -> dict[str, np.ndarray] | None:
    """The statistics of an open file; None if it has none, `UserError` if not of `dim` features.
    `ending`: of their names in the file."""
    if not {f"mu{ending}.npy", f"sigma{ending}.npy"} <= set(archive.namelist()):
        return None
    found = {}
    for name in ("mu", "sigma"):
        with archive.open(f"{name}{ending}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        found[name] = np.asarray(array, np.float64)
    if (found["mu"].shape, found["sigma"].shape) != ((dim,), (dim, dim)):
        raise UserError(
            f"{key}: mu{ending} and sigma{ending} of {printable(str(path))} are "
            f"{list(found['mu'].shape)} and {list(found['sigma'].shape)}, not of the "
            f"network's {dim} features"
        )
    return found


def file_hash(path: Path) -> str:
    """The xxh3 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def header(file: IO[bytes]) -> tuple[int, ...]:
    """Read up to the numbers of an npy file of uint8 in C order; gives its shape, empty if it is
    another."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, is_fortran, dtype = read[version](file)
    return () if is_fortran or dtype != np.uint8 else shape


@contextmanager
def reading(key: str, path: Path) -> Iterator[zipfile.ZipFile]:
    """A file that `key=` names; `UserError` if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.flag_bits & ENCRYPTED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is encrypted")
            yield archive
    except FileNotFoundError as error:
        raise UserError(f"{key}: there is no file {printable(str(path))}") from error
    except (*DAMAGE, *UNREADABLE) as error:
        raise UserError(
            f"{key}: {printable(str(path))} is no npz file, or damaged ({error})"
        ) from error
