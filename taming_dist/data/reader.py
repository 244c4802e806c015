"""Reads batches of images from shards: same batches for any number of ranks, threads or stops.

Samples are read by byte range (the tar index), decoded in threads, and never unpacked to files.
A sample that cannot be read never shifts the others: in training its place is taken by the next
good sample of the shard, in evaluation it is left out; either way it is reported and counted.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING

from taming_dist.data.faults import BrokenData
from taming_dist.data.images import (
    MAP_COLUMNS,
    CenterCrop,
    Crop,
    Preprocess,
    RandomCrop,
    RandomResizedCrop,
    decode,
)
from taming_dist.data.loader import Plan, Selection, prefetched
from taming_dist.data.manifest import Dataset
from taming_dist.data.shards import IMAGE_EXTENSIONS, read_sample
from taming_dist.data.storage import shown
from taming_dist.errors import UserError

# Enough for the lanes of a rank to stay in their shards, few enough for a limit of 1024 files.
OPEN_SHARDS = 512
# The first bad samples of a run must not be fatal only because few samples were read so far.
LEAST_SAMPLES_JUDGED = 1000


@dataclass
class ImagesConfig:
    """The `data` group of an experiment on images.

    `train`, `val`: shard specs; `train` also a list of them, or a mixture, see
    `mixture.resolve_training`. `global_batch`: images per optimizer step over all ranks.
    `micro_batch`: images per rank and forward pass. `size`: pixels of the square crops.
    `crop`: random, center, or resized: a random part of the area (`crop_scale`) and shape
    (`crop_ratio`, width by height). `lanes`, `block`: see `taming_dist.data.order`.
    `max_bad_fraction`: more bad samples end the run.
    """

    train: Any = MISSING
    val: str = MISSING
    global_batch: int = MISSING
    micro_batch: int = MISSING
    size: int = MISSING
    crop: str = "random"
    crop_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    flip: bool = True
    lanes: int = 256
    block: int = 256
    threads: int = 2
    max_bad_fraction: float = 0.001

    def preprocess(self) -> Preprocess:
        """How training images are cut; `UserError` naming the key where the values do not fit."""
        crops: dict[str, Callable[[], Crop]] = {
            "random": RandomCrop,
            "center": CenterCrop,
            "resized": lambda: RandomResizedCrop(
                _pair(self.crop_scale, "data.crop_scale"), _pair(self.crop_ratio, "data.crop_ratio")
            ),
        }
        if self.crop not in crops:
            raise UserError(f"data.crop is {self.crop!r} but must be {', '.join(crops)}")
        return Preprocess(self.size, crops[self.crop](), self.flip)


def _pair(values: Sequence[float], key: str) -> tuple[float, float]:
    if len(values) != 2:
        raise UserError(f"{key} is {list(values)} but must be two numbers, the smaller first")
    return values[0], values[1]


@dataclass(frozen=True)
class Batch:
    """Images uint8 [b, 3, h, w] and what came with them.

    `classes` int64 [b] is None where the data set has none. `segmentations` uint8 [b, h, w] and
    `depth` fp32 [b, 1, h, w] in [0, 1] (see `images.decode_depth`) are None unless the columns
    seg.png and depth.png were asked for. `ids` int64 [b] are the global sample ids, on the CPU.
    """

    images: torch.Tensor
    classes: torch.Tensor | None
    segmentations: torch.Tensor | None
    depth: torch.Tensor | None
    keys: list[str]
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        move = {
            name: value.to(device, non_blocking=True)
            for name in ("images", "classes", "segmentations", "depth")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **move)


@dataclass(frozen=True)
class _Sample:
    image: np.ndarray
    maps: dict[str, np.ndarray]
    cls: int | None
    key: str
    id: int


def log_bad_sample(record: dict[str, Any]) -> None:
    """Say in the log that a sample could not be read: shard, key, offset, error."""
    logging.getLogger(__name__).warning("bad sample: %s", json.dumps(record))


class ShardFile:
    """One open shard of a data set."""

    def __init__(self, dataset: Dataset, number: int) -> None:
        self.location = dataset.locations[number]
        self.offsets = dataset.read_index(number)
        self._source = dataset.open_shard(number)

    def read(self, index: int) -> tuple[str, dict[str, bytes]]:
        """Key and files of a sample, by extension; `BrokenData` if its headers are damaged."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return read_sample(self._source.read(start, end - start))


class Reader:
    """The images of a data set as this rank's batches.

    Args: `dataset` from `manifest.resolve`; `preprocess`; `seed`, `lanes`, `block` fix the order;
    `micro_batch` images per batch of this rank; `columns` of `images.MAP_COLUMNS` are read beside
    image and class, nothing else is decoded; `on_bad` is called with {shard, key, offset,
    error} in the consumer's thread, in the order of the samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocess,
        *,
        seed: int = 0,
        lanes: int = 256,
        block: int = 256,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int,
        columns: Sequence[str] = (),
        threads: int = 2,
        on_bad: Callable[[dict[str, Any]], None] = log_bad_sample,
        max_bad_fraction: float = 0.001,
    ) -> None:
        if threads < 1:
            raise UserError(f"data.threads is {threads} but must be at least 1")
        self.dataset = dataset
        self.plan = Plan(
            dataset.samples_per_shard,
            dataset.fingerprint,
            seed,
            lanes,
            block,
            rank,
            world_size,
            micro_batch,
            dataset.parts,
        )
        self.num_bad = 0
        self.num_read = 0
        self._preprocess, self._threads = preprocess, threads
        self._on_bad, self._max_bad_fraction = on_bad, max_bad_fraction
        self._ends = np.cumsum(dataset.samples_per_shard)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._read_class = self._choose_class_column()
        self._maps = {name: MAP_COLUMNS[name] for name in self._check_columns(columns)}

    @property
    def has_classes(self) -> bool:
        """Whether batches come with classes: every sample has one."""
        return self._read_class is not None

    def batches(self, from_sample: int = 0) -> Iterator[Batch]:
        """Endless batches for training, after `from_sample` images were consumed by all ranks."""
        return self._read(self.plan.training(from_sample), self._load_replacing)

    def epoch_batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Every image of [start, stop) once over all ranks, in order, bad ones left out."""
        return self._read(self.plan.evaluation(start, stop), self._load_leaving_out)

    def state(self, samples: int) -> dict[str, Any]:
        """See `Plan.state`."""
        return self.plan.state(samples)

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Plan.check_state`."""
        self.plan.check_state(state)

    def _read(
        self,
        selections: Iterator[Selection],
        load: Callable[[Selection], tuple[list[_Sample], list[dict[str, Any]]]],
    ) -> Iterator[Batch]:
        def load_batch(selection: Selection) -> tuple[int, Batch | None, list[dict[str, Any]]]:
            samples, bad = load(selection)
            return len(selection.ids), self._collate(samples) if samples else None, bad

        ahead = self._threads + 1
        with closing(prefetched(load_batch, selections, self._threads, ahead)) as loaded:
            for count, batch, bad in loaded:
                self._account(count, bad)
                if batch is not None:
                    yield batch

    def _account(self, count: int, bad: list[dict[str, Any]]) -> None:
        self.num_read += count
        self.num_bad += len(bad)
        for record in bad:
            self._on_bad(record)
        judged = max(self.num_read, LEAST_SAMPLES_JUDGED)
        if bad and self.num_bad > self._max_bad_fraction * judged:
            last = bad[-1]
            raise UserError(
                f"{self.num_bad} of {self.num_read} samples could not be read, more than "
                f"data.max_bad_fraction ({self._max_bad_fraction}); the last: "
                f"{last['key'] or 'at byte ' + str(last['offset'])} in {last['shard']}: "
                f"{last['error']}"
            )

    def _load_replacing(self, selection: Selection) -> tuple[list[_Sample], list[dict[str, Any]]]:
        samples: list[_Sample] = []
        bad: list[dict[str, Any]] = []
        for id, epoch in zip(selection.ids.tolist(), selection.epochs.tolist(), strict=True):
            shard, index = self._locate(id)
            count = self.dataset.shards[shard].samples
            for step in range(count):
                sample = self._try_sample(shard, (index + step) % count, epoch, bad)
                if sample is not None:
                    samples.append(sample)
                    break
            else:
                raise UserError(f"no sample of {shown(self.dataset.locations[shard])} can be read")
        return samples, bad

    def _load_leaving_out(self, selection: Selection) -> tuple[list[_Sample], list[dict[str, Any]]]:
        bad: list[dict[str, Any]] = []
        tried = [self._try_sample(*self._locate(id), 0, bad) for id in selection.ids.tolist()]
        return [sample for sample in tried if sample is not None], bad

    def _locate(self, id: int) -> tuple[int, int]:
        """Shard and place in it of a global sample id."""
        shard = int(np.searchsorted(self._ends, id, side="right"))
        return shard, id - int(self._ends[shard]) + self.dataset.shards[shard].samples

    def _try_sample(
        self, shard: int, index: int, epoch: int, bad: list[dict[str, Any]]
    ) -> _Sample | None:
        """Read, decode and cut a sample; one that is broken is noted in `bad`."""
        file = self._open(shard)
        key = ""
        try:
            key, files = file.read(index)
            id = int(self._ends[shard]) - self.dataset.shards[shard].samples + index
            pixels = decode(_image_of(files))
            height, width = pixels.shape[:2]
            view = self._preprocess.view(height, width, self.plan.seed, epoch, id)
            image = np.empty((view.size, view.size, 3), dtype=np.uint8)
            view.cut(pixels, image)
            maps = {}
            for name, column in self._maps.items():
                values = column.decode(_need(files, name))
                if values.shape != (height, width):
                    raise BrokenData(
                        f"a .{name} of {values.shape} on an image of {(height, width)}"
                    )
                maps[name] = np.empty((view.size, view.size), dtype=column.dtype)
                view.cut(values, maps[name], column.method)
            cls = self._read_class(files) if self._read_class is not None else None
            return _Sample(image, maps, cls, key, id)
        except BrokenData as error:
            offset = int(file.offsets[index])
            record = {
                "shard": shown(file.location),
                "key": key,
                "offset": offset,
                "error": str(error),
            }
            bad.append(record)
            return None

    def _open_shard(self, shard: int) -> ShardFile:
        return ShardFile(self.dataset, shard)

    def _check_columns(self, columns: Sequence[str]) -> Sequence[str]:
        for name in columns:
            assert name in MAP_COLUMNS, name
            count = self.dataset.columns.get(name, 0)
            if count < self.dataset.num_samples:
                raise UserError(
                    f"the model reads .{name}, which {count} of {self.dataset.num_samples} samples "
                    f"of {self.dataset.paths[0].parent} have: make the shards with it"
                )
        return columns

    def _everyone_has(self, column: str) -> bool:
        count, everyone = self.dataset.columns.get(column, 0), self.dataset.num_samples
        if 0 < count < everyone:
            logging.getLogger(__name__).warning(
                "only %d of %d samples have a .%s: it is not read", count, everyone, column
            )
        return count == everyone

    def _choose_class_column(self) -> Callable[[dict[str, bytes]], int] | None:
        """Where the class of a sample stands: all samples have one, or none is read."""
        if not self.dataset.classes_agree:
            return None
        if self._everyone_has("cls"):
            return lambda files: _parse_class(_need(files, "cls"))
        if self.dataset.columns.get("json", 0) == self.dataset.num_samples:
            try:
                record = _parse_json(_need(self._open(0).read(0)[1], "json"))
            except BrokenData as error:
                first = shown(self.dataset.locations[0])
                raise UserError(f"the first sample of {first} is damaged: {error}") from error
            for name in ("cls", "label"):
                if isinstance(record.get(name), int):
                    return partial(_parse_json_class, name=name)
        return None

    def _collate(self, samples: list[_Sample]) -> Batch:
        images = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
        maps = {
            name: torch.from_numpy(np.stack([sample.maps[name] for sample in samples]))
            for name in self._maps
        }
        depth = maps.get("depth.png")
        classes = torch.tensor([sample.cls for sample in samples]) if self.has_classes else None
        return Batch(
            images=torch.from_numpy(images),
            classes=classes,
            segmentations=maps.get("seg.png"),
            depth=None if depth is None else depth[:, None],
            keys=[sample.key for sample in samples],
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        )


def _image_of(files: dict[str, bytes]) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if extension in files:
            return files[extension]
    raise BrokenData(f"no image among {', '.join(sorted(files)) or 'its files'}")


def _need(files: dict[str, bytes], column: str) -> bytes:
    if column not in files:
        raise BrokenData(f"no .{column} among {', '.join(sorted(files)) or 'its files'}")
    return files[column]


def _parse_class(data: bytes) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise BrokenData(f"its class {data[:20]!r} is no number") from error


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise BrokenData(f"its json is damaged ({error})") from error
    return record if isinstance(record, dict) else {}


def _parse_json_class(files: dict[str, bytes], name: str) -> int:
    value = _parse_json(_need(files, "json")).get(name)
    if not isinstance(value, int):
        raise BrokenData(f"its json has no number {name!r}")
    return value
