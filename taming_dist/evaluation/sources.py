"""Sets of images that users name: folders of pictures, arrays in npz files, image shards.

Each gives its images uint8 [b, 3, h, w] with their numbers, every rank a part of them, and has a
fingerprint of what it holds.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from taming_dist.access import require_readable
from taming_dist.data.images import Preprocess, centre_view
from taming_dist.data.reader import Reader, Reading
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.archives import Rows
from taming_dist.evaluation.progress import with_progress
from taming_dist.formats.encoded import open_image
from taming_dist.formats.faults import BrokenData
from taming_dist.formats.manifest import MANIFEST, resolve, specs_of
from taming_dist.formats.names import natural_order, printable
from taming_dist.formats.shards import IMAGE_EXTENSIONS
from taming_dist.formats.storage import is_url

PATTERN = set("*?[{")  # of several shards


class Some(NamedTuple):
    """Images uint8 [b, 3, h, w], their numbers int64 [b], and their classes int64 [b], where all of
    the set have one."""

    pixels: Tensor
    ids: Tensor
    classes: Tensor | None = None


@dataclass(frozen=True)
class Intake:
    """How images are read: `batch` at once, by so many `threads`; `size`: the pixels of their
    centre crops, None: as they are, which is then alike for all of a set. More images of shards
    than `max_bad_fraction` that cannot be read are an error, and of others any."""

    batch: int
    size: int | None = None
    threads: int = 2
    max_bad_fraction: float = 0.001

    def prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels uint8 [h, w, 3] as they are compared."""
        if self.size is None or pixels.shape[:2] == (self.size, self.size):
            return pixels
        out = np.empty((self.size, self.size, 3), np.uint8)
        height, width = pixels.shape[:2]
        centre_view(height, width, (self.size, self.size)).cut(pixels, out)
        return out

    def prepared_planes(self, pixels: Tensor) -> Tensor:
        """The same of pixels uint8 [3, h, w]."""
        return torch.from_numpy(self.prepared(pixels.permute(1, 2, 0).numpy())).permute(2, 0, 1)


class Source(Protocol):
    """A set of images; `key` is the option that names it."""

    @property
    def key(self) -> str: ...
    @property
    def fingerprint(self) -> str:
        """Of what it holds; another set has another."""
        ...

    def batches(self, intake: Intake, world: World) -> Iterator[Some]:
        """Yield this rank's images. `UserError`: they cannot be read, or not stacked."""
        ...


def read(source: Source, intake: Intake, world: World) -> Iterator[Some]:
    """Yield this rank's images of a set, and report progress."""
    batches = source.batches(intake, world)
    return with_progress(batches, None, world, lambda some: len(some.ids), f"{source.key}: ")


def open_source(key: str, value: Any) -> Source:
    """The set that `key=value` names.

    Raises:
        UserError: there is none, or it has no images.
    """
    if isinstance(value, str) and not is_url(value):
        require_readable(value)
        path = Path(value)
        if path.suffix == ".npz":
            return ArrayOfImages(key, Rows.open(key, path))
        if path.is_dir() and not (path / MANIFEST).exists() and not any(path.glob("*.tar")):
            return FolderOfImages(key, path)
        if path.is_file() and path.suffix != ".tar":
            raise UserError(
                f"{key}: {printable(value)} is no set of images: give a folder of pictures, an npz "
                f"file or image shards"
            )
        if not path.exists() and not PATTERN & set(value):
            raise UserError(f"{key}: there is no {printable(value)}")
    return Shards(key, value)


@dataclass
class FolderOfImages:
    """Pictures in a folder and in those inside it, in the natural order of their names."""

    key: str
    folder: Path
    files: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        found = (
            file.relative_to(self.folder)
            for file in self.folder.rglob("*")
            if file.suffix[1:].lower() in IMAGE_EXTENSIONS
            and not file.is_dir()
            and not any(part.startswith(".") for part in file.relative_to(self.folder).parts)
        )
        self.files = sorted(found, key=lambda file: natural_order(file.as_posix()))
        if not self.files:
            raise UserError(
                f"{self.key}: {printable(str(self.folder))} has no pictures "
                f"({', '.join(IMAGE_EXTENSIONS)}) in it"
            )

    @property
    def fingerprint(self) -> str:
        sha = hashlib.sha256()
        for file in self.files:
            data = xxhash.xxh3_128_hexdigest((self.folder / file).read_bytes())
            sha.update(f"{printable(file.as_posix())} {data}\n".encode())
        return sha.hexdigest()

    def batches(self, intake: Intake, world: World) -> Iterator[Some]:
        numbers = range(world.rank, len(self.files), world.world_size)
        with ThreadPoolExecutor(intake.threads) as threads:
            for start in range(0, len(numbers), intake.batch):
                some = numbers[start : start + intake.batch]
                found = threads.map(lambda number: intake.prepared(self._pixels(number)), some)
                yield stacked(self.key, dict(zip(some, found, strict=True)), self._name)

    def _pixels(self, number: int) -> np.ndarray:
        try:
            return open_image((self.folder / self.files[number]).read_bytes()).pixels()
        except BrokenData as error:
            raise UserError(f"{self.key}: {self._name(number)} cannot be read: {error}") from error

    def _name(self, number: int) -> str:
        return printable(str(self.folder / self.files[number]))


@dataclass
class ArrayOfImages:
    """The images of an npz file as ADM's suite has it (arXiv 2105.05233)."""

    key: str
    rows: Rows

    @property
    def fingerprint(self) -> str:
        return self.rows.fingerprint

    def batches(self, intake: Intake, world: World) -> Iterator[Some]:
        some: dict[int, np.ndarray] = {}
        for number, pixels in self.rows.every(world.rank, world.world_size):
            some[number] = intake.prepared(pixels)
            if len(some) == intake.batch:
                yield stacked(self.key, some, str)
                some = {}
        if some:
            yield stacked(self.key, some, str)


class Shards:
    """The images of shards; those that cannot be read are left out."""

    def __init__(self, key: str, spec: Any) -> None:
        self.key, self.spec = key, spec
        self._dataset = resolve(specs_of(spec))

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    def batches(self, intake: Intake, world: World) -> Iterator[Some]:
        if intake.size is None:
            raise UserError(
                f"{self.key}: images of shards are cut to one size: give size=, in pixels"
            )
        reading = Reading(
            Preprocess(intake.size),
            intake.batch,
            rank=world.rank,
            world_size=world.world_size,
            threads=intake.threads,
            max_bad_fraction=intake.max_bad_fraction,
        )
        for batch in Reader(self._dataset, reading).epoch_batches():
            classes = None if batch.classes is None else batch.classes.long()
            yield Some(batch.columns["image"], batch.ids, classes)


def stacked(key: str, some: dict[int, np.ndarray], name: Callable[[int], str]) -> Some:
    """Images [h, w, 3] by their numbers as a batch.

    Raises:
        UserError: one is of another size than the first.
    """
    (first, pixels), *rest = some.items()
    for number, other in rest:
        if other.shape != pixels.shape:
            shapes = ["x".join(map(str, each.shape[:2])) for each in (pixels, other)]
            raise UserError(
                f"{key}: {name(first)} has {shapes[0]} pixels and {name(number)} {shapes[1]}: give "
                f"size=, to which all are cut"
            )
    images = torch.from_numpy(np.stack(list(some.values()))).permute(0, 3, 1, 2).contiguous()
    return Some(images, torch.tensor(list(some)))
