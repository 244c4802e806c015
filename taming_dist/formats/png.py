"""Pictures as PNG files that say in their text chunks what they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from taming_dist.atomic import replacing
from taming_dist.formats.files import writing


def save_png(picture: Tensor, path: Path, description: str = "") -> None:
    """Write uint8 [3,h,w] as PNG, whole or not at all; the file keeps the description as text."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write_png(picture, file, {"Description": description} if description else {})


def write_png(picture: Tensor, file: BinaryIO, texts: Mapping[str, str]) -> None:
    """Write uint8 [3,h,w] as PNG to an open file, with texts by keyword."""
    facts = PngInfo()
    for keyword, text in texts.items():
        facts.add_text(keyword, text)
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    image.save(file, format="PNG", pnginfo=facts)
