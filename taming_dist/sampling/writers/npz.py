"""All pictures as one array: the layout of ADM's samples, which evaluation suites read.

Source: arXiv 2105.05233 (ADM); its suite takes `arr_0` uint8 [n, h, w, 3] and, from conditional
models, `arr_1` int64 [n], the classes.
"""

import shutil
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np

from taming_dist.atomic import replacing
from taming_dist.formats.npy import to_npy
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.writers.interface import Finished, Writer

NAME = "samples.npz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of the members: the same pictures give the same bytes


class NpzWriter(Writer):
    """<out>/samples.npz, uncompressed; no picture is in memory for longer than it takes to write
    it. Until the run is finished its rows lie in one file for each unit."""

    pattern = r"samples\.npz"

    @staticmethod
    def file(index: int) -> str:
        return NAME

    def write(self, number: int, pictures: Iterable[Picture]) -> None:
        with replacing(self._part(number), self.worker) as file:
            for picture in pictures:
                for strip in picture.strips:
                    file.write(strip.permute(1, 2, 0).contiguous().numpy().tobytes())

    def finish(self, units: Iterable[Finished]) -> None:
        found = list(units)
        images = [image for unit in found for image in unit.images]
        height, width = found[0].size
        classes = [image.get("class") for image in images]
        with (
            replacing(self.out / NAME, self.worker) as file,
            zipfile.ZipFile(file, "w", allowZip64=True) as archive,
        ):
            with archive.open(member("arr_0.npy"), "w", force_zip64=True) as rows:
                rows.write(header((len(images), height, width, 3)))
                for unit in found:
                    with open(self._part(unit.number), "rb") as part:
                        shutil.copyfileobj(part, rows, 2**20)
            if None not in classes:
                archive.writestr(member("arr_1.npy"), to_npy(np.array(classes, np.int64)))

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.rows"


def member(name: str) -> zipfile.ZipInfo:
    """A member of the archive that has no time."""
    return zipfile.ZipInfo(name, EPOCH)


def header(shape: tuple[int, ...]) -> bytes:
    """The beginning of the npy file of a uint8 array, before its bytes."""
    out = BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, facts)
    return out.getvalue()
