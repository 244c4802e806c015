"""Reading batches of images from shards: the same ones for any number of ranks, threads or stops.

Samples are read by byte range (`fetching`), decoded into rows (`decoding`), and never unpacked to
files: in a separate process for training (`worker`), in threads for evaluation. This is the
trainer's side of it: batches, and an account of what could not be read.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import MISSING

from taming_dist.data.batching import DataConfig
from taming_dist.data.decoding import (
    Decoder,
    Extra,
    Filled,
    choose_class_column,
    decode_in_threads,
)
from taming_dist.data.images import (
    COLUMNS,
    CenterCrop,
    Crop,
    Preprocess,
    RandomCrop,
    RandomResizedCrop,
)
from taming_dist.data.plan import Plan
from taming_dist.data.slots import Rows
from taming_dist.data.worker import decode_in_process
from taming_dist.errors import UserError
from taming_dist.formats.faults import SKIP, USE
from taming_dist.formats.manifest import Dataset
from taming_dist.formats.storage import folder_of, shown
from taming_dist.formats.strict_json import json_safe
from taming_dist.ranges import ranged

# The first bad samples of a run must not be fatal just because few samples were read so far.
LEAST_SAMPLES_JUDGED = 1000
MOST_THREADS = 1024


@dataclass
class ImagesConfig(DataConfig):
    """The `data` group of an experiment on images.

    `train`, `val`: shard specs, or lists of them; `train` also a mixture, see
    `mixture.resolve_training`, or with `streaming` shards without an index, even (`allow_pipe`)
    commands of a shell, see `streaming.stream_locations`.
    `size`: pixels of the square crops. `crop`: random, center, or resized: a random part of the
    area (`crop_scale`) and shape (`crop_ratio`, width by height).
    `max_bad_fraction`: more bad samples end the run. `damaged`: a partly lost JPEG counts as bad
    (skip), or what is left of it is used and reported (use).
    """

    streaming: bool = False
    allow_pipe: bool = False
    size: int = ranged(MISSING, at_least=1)
    crop: str = "random"
    crop_scale: list[float] = ranged([0.25, 1.0], above=0, at_most=1, length=2)
    crop_ratio: list[float] = ranged([0.75, 4 / 3], above=0, length=2)
    flip: bool = True
    block: int = ranged(64, at_least=1)
    threads: int = ranged(2, at_least=1, at_most=MOST_THREADS)
    max_bad_fraction: float = ranged(0.001, at_least=0, at_most=1)
    damaged: str = SKIP

    @property
    def has_order(self) -> bool:
        return not self.streaming

    def preprocess(self) -> Preprocess:
        """How training images are cropped; `UserError` naming the key of an invalid value."""
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
    """The requested columns of b samples, cropped alike.

    `columns` of `images.COLUMNS` by name: image and lr uint8 [b, 3, h, w], seg.png and edges.png
    uint8 [b, h, w], depth.png fp32 [b, h, w] in [0, 1] (see `encoded.open_depth`). `classes` int64
    [b] is None where the data set has none. `ids` int64 [b] are the global sample ids, and `crops`
    fp64 [b, 5] tell where in its image each lies (see `images.View.crop`). `extra`: what else was
    asked for by name, a value for each image. All of it is in the CPU's memory (`copies.to_device`
    brings it to a GPU).
    """

    columns: dict[str, torch.Tensor]
    classes: torch.Tensor | None
    keys: list[str]
    ids: torch.Tensor
    crops: torch.Tensor
    extra: Mapping[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


def log_bad_sample(record: dict[str, Any]) -> None:
    """Log a bad or damaged sample: shard, key, offset, error."""
    kind = "damaged" if record.get("used") else "bad"
    text = json.dumps(json_safe(record), allow_nan=False)
    logging.getLogger(__name__).warning("%s sample: %s", kind, text)


@dataclass(frozen=True)
class Reading:
    """What every reader of images is told.

    `micro_batch` images per batch of this rank; `seed` decides order and crops. `columns` of
    `images.COLUMNS` are read, and `with_classes` the class where every sample has one; nothing else
    is decoded. `on_bad` is called with {shard, key, offset, error} in the consumer's thread, in the
    order of the samples; a larger fraction of bad samples than `max_bad_fraction` is a `UserError`.
    `damaged` as in `ImagesConfig`: partly lost pictures that are used are reported with {..., used:
    true}, and do not count as bad.
    """

    preprocess: Preprocess
    micro_batch: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    columns: Sequence[str] = ("image",)
    with_classes: bool = True
    threads: int = 2
    on_bad: Callable[[dict[str, Any]], None] = log_bad_sample
    max_bad_fraction: float = 0.001
    damaged: str = SKIP

    def __post_init__(self) -> None:
        if self.damaged not in (SKIP, USE):
            raise UserError(f"data.damaged is {self.damaged!r} but must be {SKIP} or {USE}")
        if self.threads < 1:
            raise UserError(f"data.threads is {self.threads} but must be at least 1")


class Batching:
    """What every reader does with decoded samples: count them, report bad ones, make batches."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.num_bad = 0
        self.num_damaged = 0  # of those that are used
        self.num_read = 0

    def keys(self, batch: Batch) -> list[str]:
        """The names of a batch's samples."""
        return batch.keys

    def counts(self) -> dict[str, int]:
        """The number of samples that this rank could not read, and of damaged ones that it used,
        since the run was started or resumed."""
        return {"bad_samples": self.num_bad, "damaged_used": self.num_damaged}

    def count(
        self, asked: int, bad: Sequence[dict[str, Any]], damaged: Sequence[dict[str, Any]]
    ) -> None:
        """Count `asked` samples that were tried, and the bad and damaged ones among them."""
        self.num_read += asked
        self.num_bad += len(bad)
        self.num_damaged += len(damaged)
        for record in bad:
            self.reading.on_bad(record)
        for record in damaged:
            self.reading.on_bad(record | {"used": True})
        judged, most = max(self.num_read, LEAST_SAMPLES_JUDGED), self.reading.max_bad_fraction
        if bad and self.num_bad > most * judged:
            last = bad[-1]
            raise UserError(
                f"{self.num_bad} of {self.num_read} samples could not be read, more than "
                f"data.max_bad_fraction ({most}); the last: "
                f"{last['key'] or 'at byte ' + str(last['offset'])} in {last['shard']}: "
                f"{last['error']}"
            )

    def batch(self, keys: list[str], rows: Rows, has_classes: bool) -> Batch:
        """The first rows, as many as there are keys; the columns are not copied."""
        count = len(keys)
        columns = {name: torch.from_numpy(values[:count]) for name, values in rows.columns.items()}
        return Batch(
            columns={name: c.movedim(3, 1) if c.ndim == 4 else c for name, c in columns.items()},
            classes=torch.from_numpy(rows.classes[:count].copy()) if has_classes else None,
            keys=keys,
            ids=torch.from_numpy(rows.ids[:count].copy()),
            crops=torch.from_numpy(rows.crops[:count].copy()),
        )


class Reader(Batching):
    """This rank's batches of the images of a data set.

    `dataset` from `manifest.resolve`; `lanes`, `block` determine the order with the seed;
    `most_evaluated`, `encoders`, see `Plan`; `extra` of each sample's files is read, too (see
    `Decoder`). An invalid class is a `UserError`.
    """

    def __init__(
        self,
        dataset: Dataset,
        reading: Reading,
        *,
        lanes: int = 256,
        block: int = 64,
        most_evaluated: int = 0,
        extra: Extra | None = None,
        encoders: tuple[str, ...] = (),
    ) -> None:
        super().__init__(reading)
        self.dataset = dataset
        self.plan = Plan(
            dataset.samples_per_shard,
            dataset.fingerprint,
            reading.seed,
            lanes,
            block,
            reading.rank,
            reading.world_size,
            reading.micro_batch,
            dataset.parts,
            most_evaluated,
            encoders,
        )
        if reading.with_classes:
            warn_of_partial_classes(dataset)
        self.decoder = Decoder(
            dataset,
            self.plan,
            reading.preprocess,
            check_columns(reading.columns, dataset),
            choose_class_column(dataset) if reading.with_classes else None,
            extra or {},
            use_damaged=reading.damaged == USE,
        )

    @property
    def has_classes(self) -> bool:
        """Whether batches have classes: they were requested, and every sample has one."""
        return self.decoder.read_class is not None

    def batches(self, from_sample: int = 0) -> Iterator[Batch]:
        """Yield endless training batches, after `from_sample` images were consumed by all ranks.

        They are decoded in a separate process until the iterator is closed or dropped.
        """
        self.plan.check_start(from_sample)  # here rather than in the other process
        return decode_in_process(self.decoder, from_sample, self.reading.threads, self._account)

    def epoch_batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield every image of [start, stop), or `most_evaluated` of them, once over all ranks, in
        order, without bad ones."""
        decoded = decode_in_threads(self.decoder, start, stop, self.reading.threads)
        with closing(decoded):
            for filled, rows in decoded:
                batch = self._account(filled, rows)
                if len(batch):
                    yield batch

    def _account(self, filled: Filled, rows: Rows) -> Batch:
        """Report bad samples and make a batch of the good ones."""
        self.count(filled.asked, filled.bad, filled.damaged)
        batch = self.batch(filled.keys, rows, self.has_classes)
        return replace(batch, extra=filled.extra) if filled.extra else batch


def check_columns(columns: Iterable[str], dataset: Dataset) -> tuple[str, ...]:
    """The requested columns in order of reading; `UserError` if a sample lacks one."""
    ordered = in_order(columns)
    for name in set(ordered) - {"image"}:  # samples without an image are bad, but not fatal
        count = sum(dataset.columns.get(extension, 0) for extension in COLUMNS[name].files)
        if count < dataset.num_samples:
            raise UserError(
                f"the model reads .{name}, which {count} of {dataset.num_samples} samples of "
                f"{shown(folder_of(dataset.locations[0]))} have: make the shards with it"
            )
    return ordered


def in_order(columns: Iterable[str]) -> tuple[str, ...]:
    """Names of columns in the order in which they are read."""
    asked = set(columns)
    assert asked <= set(COLUMNS), asked
    return tuple(name for name in COLUMNS if name in asked)


def num_unclassed(dataset: Dataset) -> int:
    """The number of samples without a .cls if others have one; then classes are not read."""
    classed = dataset.columns.get("cls", 0)
    return dataset.num_samples - classed if classed else 0


def warn_of_partial_classes(dataset: Dataset) -> None:
    """Warn that classes are not read if only some samples have one."""
    missing, everyone = num_unclassed(dataset), dataset.num_samples
    if missing:
        logging.getLogger(__name__).warning(
            "only %d of %d samples have a .cls: it is not read", everyone - missing, everyone
        )
