"""A PNG file for each picture."""

import os
from collections.abc import Iterable
from io import BytesIO

from taming_dist.formats.png import write_png
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
            temporary = self.parts / f"{picture.index}.{self.worker}.tmp"
            with open(temporary, "wb") as file:
                write_png(picture.pixels(), file, {KEYWORD: self.text(picture.index)})
            os.replace(temporary, self.out / self.file(picture.index))

    def finish(self, units: Iterable[Finished]) -> None:
        """Nothing: the pictures lie where they belong."""


def encoded(picture: Picture, text: str) -> bytes:
    """The PNG file of a picture."""
    file = BytesIO()
    write_png(picture.pixels(), file, {KEYWORD: text})
    return file.getvalue()
