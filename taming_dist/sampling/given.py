"""Pictures that users give to the sampling command, as a VQGAN encodes them.

They are read as `tools/make_shards.py` reads them and cropped as `tools/tokenize_dataset.py` crops
them, so that a picture has the codes that it would have in code shards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taming_dist.access import require_readable
from taming_dist.data.images import COLUMNS, Shape, centre_view
from taming_dist.errors import UserError
from taming_dist.formats.encoded import depth_shares
from taming_dist.formats.names import natural_order, printable
from taming_dist.formats.shards import IMAGE_EXTENSIONS
from taming_dist.generation.generator import evaluating
from taming_dist.models.modalities import LabelMap, nearest
from taming_dist.models.vqgan import VQGAN, check_all_coded
from taming_dist.prepare.collections.entry import is_hidden
from taming_dist.prepare.making.derived import canny_edges, require_canny
from taming_dist.prepare.making.layers import (
    Unfit,
    open_depth,
    open_edges,
    open_labels,
    open_picture,
)

MAX_BYTES = 2**29  # of a file; the decoders limit the pixels
REMEMBERED = 1024  # pictures whose codes are kept at most


@dataclass(eq=False)
class Given:
    """The pictures that `key=` names, the largest part of each in the centre with the proportions
    of `shape`, in as many pixels.

    They are scaled to `scaled` pixels by nearest neighbour before they are encoded, as
    `--condition-size` of the tokenization does.
    """

    key: str
    paths: tuple[Path, ...]
    vqgan: VQGAN
    shape: Shape
    scaled: Shape

    def __post_init__(self) -> None:
        self._coded = lru_cache(maxsize=REMEMBERED)(self._code)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        """The file of a picture."""
        return printable(str(self.paths[number % len(self)]))

    @property
    def reader(self) -> Callable[[bytes], np.ndarray]:
        """What reads the pixels of a file."""
        return READERS[self.vqgan.config.modality.column]

    def input(self, number: int) -> Tensor:
        """What the VQGAN encodes of a picture, [1, c, h, w] on its device.

        Raises:
            UserError: the file cannot be read as one of its kind; names it.
        """
        path, modality = self.paths[number % len(self)], self.vqgan.config.modality
        pixels = read_column(self.key, path, modality.column, self.shape)
        if isinstance(modality, LabelMap) and int(pixels.max()) >= modality.classes:
            raise UserError(
                f"{self.key}: {self.name(number)} has the class {int(pixels.max())}, but its "
                f"VQGAN knows 0 to {modality.classes - 1}: give a label map of the same classes"
            )
        column = torch.from_numpy(pixels)[None]
        column = column.movedim(3, 1) if column.ndim == 4 else column
        taken = modality.take({modality.column: column}, self.vqgan.quant_conv.weight.device)
        return modality.tensor(taken)

    def codes(self, numbers: Sequence[int]) -> Tensor:
        """The codes int64 [b, *shape] of pictures, on the CPU; the first comes after the last.

        Each is encoded alone, so that its codes do not depend on the others.
        """
        return torch.stack([self._coded(number % len(self)) for number in numbers])

    @torch.no_grad()
    def _code(self, number: int) -> Tensor:
        with evaluating(self.vqgan):
            codes = self.vqgan.encode(nearest(self.input(number), self.scaled)).cpu()
        check_all_coded(codes, [f"{self.key}: {self.name(number)}"], "give another picture")
        return codes[0]

    def picture(self, number: int) -> Tensor:
        """A picture as colours, [3, h, w] in [-1, 1] on the CPU."""
        found = self.vqgan.config.modality.picture(self.input(number))
        return found[0].clamp(-1, 1).cpu()


def are_pictures(value: Any) -> bool:
    """Whether what is typed names pictures, rather than code shards or layouts: files with the
    extension of an image, or a folder that has such files and no manifest."""
    parts = value if isinstance(value, list | tuple) else [value]
    return bool(parts) and all(isinstance(part, str) and _is_pictures(part) for part in parts)


def _is_pictures(place: str) -> bool:
    if _has_extension(place):
        return "://" not in place
    folder = Path(place)
    if not folder.is_dir() or (folder / "manifest.json").exists():
        return False
    return bool(_pictures_in(folder))


def _has_extension(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and not is_hidden(name)


def _pictures_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _has_extension(path.name) and path.is_file()]
    return sorted(found, key=lambda path: natural_order(path.name))


def paths_of(key: str, value: Any) -> tuple[Path, ...]:
    """The files of pictures that `key=` names: files, or folders, whose pictures are taken in the
    natural order of their names, without those of folders inside.

    Raises:
        UserError: there is none.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    if not parts or "" in parts:  # which would be the current folder
        raise UserError(f"{key}: name a picture or a folder of pictures")
    found: list[Path] = []
    for part in parts:
        path = Path(str(part))
        require_readable(path)
        if path.is_dir():
            inside = _pictures_in(path)
            if not inside:
                raise UserError(
                    f"{key}: {printable(str(path))} has no pictures "
                    f"({', '.join(IMAGE_EXTENSIONS)}) in it"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{key}: there is no file {printable(str(path))}")
    return tuple(found)


def read_column(key: str, path: Path, column: str, shape: Shape) -> np.ndarray:
    """Return the part of a picture that is encoded, as a batch of image shards has it in a column
    of `taming_dist.data.images.COLUMNS`: [*shape(, 3)].

    Raises:
        UserError: the file cannot be read as one of its kind; names `key` and file.
    """
    pixels = read_file(key, path, READERS[column])
    if column == "edges.png" and pixels.ndim == 3:
        require_canny(f"{key}: {path.name} is a photograph, and finding its edges")
        return canny_edges(cut(pixels, shape, COLUMNS["image"].method))
    return cut(pixels, shape, COLUMNS[column].method)


def cut(pixels: np.ndarray, shape: Shape, method: Image.Resampling) -> np.ndarray:
    """Return the largest part in the centre of pixels [h, w(, c)] with the proportions of a shape,
    resized to it."""
    out = np.empty((*shape, *pixels.shape[2:]), pixels.dtype)
    height, width = pixels.shape[:2]
    centre_view(height, width, shape).cut(pixels, out, method)
    return out


def read_file(key: str, path: Path, reader: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """Return the pixels of a file.

    Raises:
        UserError: it cannot be read, or is not of the kind that `reader` reads.
    """
    name = printable(str(path))
    require_readable(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{key}: {name} has more than {MAX_BYTES} bytes: use a smaller file")
        return reader(path.read_bytes())
    except Unfit as error:
        raise UserError(f"{key}: {name}: {error.reason}") from error
    except OSError as error:
        raise UserError(f"{key}: {name} cannot be read ({error.strerror})") from error


def photograph(data: bytes) -> np.ndarray:
    """The pixels uint8 [h, w, 3] of an image, upright."""
    picture = open_picture(data)
    layer = picture.layer if picture.turn is None else picture.layer.turned(picture.turn)
    return layer.pixels


def _labels(data: bytes) -> np.ndarray:
    return open_labels(data, 0).pixels


def _depth(data: bytes) -> np.ndarray:
    return depth_shares(open_depth(data).pixels)


def _edges(data: bytes) -> np.ndarray:
    """A PNG with one channel is a map of edges; of anything else they have to be found."""
    picture = open_picture(data)
    is_map = picture.layer.extension == "png" and "greyscale" in picture.notes
    return open_edges(data).pixels if is_map else photograph(data)


# column of image shards -> how the pixels of a file become it
READERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "image": photograph,
    "lr": photograph,
    "seg.png": _labels,
    "depth.png": _depth,
    "edges.png": _edges,
}
