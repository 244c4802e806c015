"""A PNG file for each picture."""

from collections.abc import Iterable, Mapping
from io import BytesIO
from itertools import chain
from typing import BinaryIO

from taming_dist.atomic import replacing
from taming_dist.formats.png import write_png
from taming_dist.formats.png_strips import write_png_strips
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.writers.interface import Finished, Writer

KEYWORD = "taming_dist"  # of the text chunk with the recipe


class PngWriter(Writer):
    """<out>/000000.png and so on, each with its recipe in a text chunk."""

    pattern = r"\d{6,}\.png"

    @staticmethod
    def file(index: int) -> str:
        return f"{index:06d}.png"

    def write(self, number: int, pictures: Iterable[Picture]) -> None:
        for picture in pictures:
            path = self.out / self.file(picture.index)
            with replacing(path, self.worker, self.parts) as file:
                write_picture(picture, file, {KEYWORD: self.text(picture.index)})

    def finish(self, units: Iterable[Finished]) -> None:
        """Nothing: the pictures lie where they belong."""


def encoded(picture: Picture, text: str) -> bytes:
    """The PNG file of a picture."""
    file = BytesIO()
    write_picture(picture, file, {KEYWORD: text})
    return file.getvalue()


def write_picture(picture: Picture, file: BinaryIO, texts: Mapping[str, str]) -> None:
    """Write a picture as PNG with texts by keyword; one that comes in strips is never in memory as
    a whole."""
    strips = iter(picture.strips)
    first = next(strips)
    if first.shape[1] == picture.height:
        write_png(first, file, texts)
    else:
        write_png_strips(chain((first,), strips), (picture.height, picture.width), file, texts)
