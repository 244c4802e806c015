"""The folder of a run: its pictures, all of them at a glance, and what made them."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.formats.png import save_png
from taming_dist.formats.strict_json import write_json
from taming_dist.generation.generator import Generator
from taming_dist.generation.pictures import beside_given, image_grid
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.picture import Picture

GRID_COLUMNS = 10
GRID_IMAGES = 100


def prepare_folder(out: Path, n: int) -> None:
    """Make `out` ready for n images: writable, and free of an earlier run's, which would be taken
    for this one's should it end early. A larger run's are not ours to remove, nor are pictures
    with other names than ours."""
    earlier = [picture for picture in out.glob("*.png") if is_ours(picture)]
    for picture in earlier:
        if int(picture.stem) >= n:
            raise UserError(
                f"out: {picture} is of an earlier, larger run; remove it or give another folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        (out / "samples.json").unlink(missing_ok=True)  # first: it says that the folder is complete
        (out / "grid.png").unlink(missing_ok=True)
        for picture in earlier:
            picture.unlink()
    except OSError as error:
        raise UserError(f"out: cannot write to {out} ({error.strerror}), give another") from error


def is_ours(picture: Path) -> bool:
    """Whether a picture is named as those of a run are."""
    return picture.stem.isdecimal() and picture.name == picture_name(int(picture.stem))


def picture_name(index: int) -> str:
    """The file of a run's image."""
    return f"{index:06d}.png"


def write_pictures(
    pictures: Iterator[Picture], out: Path, shown: list[Tensor]
) -> Iterator[dict[str, Any]]:
    """Write each picture as <out>/<index>.png and yield what samples.json says of it; the first
    ones are also added to `shown`."""
    for picture in pictures:
        pixels = picture.pixels()
        save_png(pixels, out / picture_name(picture.index))
        if picture.index < GRID_IMAGES:
            shown.append(pixels)
        yield {"file": picture_name(picture.index), **picture.facts}


def write_grid(
    shown: Sequence[Tensor], given: Callable[[int], Sequence[Tensor]], period: int, out: Path
) -> None:
    """Write <out>/grid.png of the first pictures of a run, beside what was given for them."""
    pictures, columns = beside_given(shown, given, period, GRID_COLUMNS)
    save_png(image_grid(torch.stack(pictures), columns), out / "grid.png")


def write_record(
    config: SampleConfig, generator: Generator, images: list[dict[str, Any]], out: Path
) -> None:
    """Write <out>/samples.json: settings, fingerprints, and the class of each image (or null)."""
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(config),
        "fingerprints": {
            "transformer": generator.transformer.fingerprint,
            "vqgan": generator.vqgan.fingerprint,
        },
        "images": images,
    }
    write_json(out / "samples.json", record)
