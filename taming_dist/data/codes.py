"""Reads codes for stage 2: a data set of code shards, and this rank's batches of it.

Nothing is held per sample: shards are mapped when they are first needed, checked whole once, and
the least recently used are closed again. Stage 2 reads nothing else: no image, no encoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from taming_dist.data.batching import DataConfig
from taming_dist.data.plan import Plan, Selection, prefetched
from taming_dist.errors import UserError
from taming_dist.formats.agreement import (
    check_agreement,
    check_classes,
    check_column,
    number_of_classes,
    shared_facts,
)
from taming_dist.formats.code_shards import (
    BOXES,
    CLASSES,
    CONDITIONS,
    CROPS,
    CodeShard,
    codes_dtype,
    open_verified,
)
from taming_dist.formats.manifest import CODES_FORMAT, Dataset, Manifest, resolve
from taming_dist.formats.objects import Boxes

# Enough for the lanes of a rank to stay in their shards; a system allows some 65,000 mappings.
OPEN_SHARDS = 512
# The columns that are read only if they are asked for, and the option that writes each.
OPTIONS = {CROPS: "--coordinates", BOXES: "--boxes"}
# Samples gathered in one go: the cost of finding out which ones are next is shared by many.
GATHERED_SAMPLES = 4096


@dataclass
class CodesConfig(DataConfig):
    """The `data` group of an experiment on codes.

    `vqgan`: export that wrote the codes; its decoder draws the previews, without it there are none.
    `in_memory`: read shards into memory and keep them, where the disk is slow and they fit.
    """

    in_memory: bool = False
    vqgan: str = ""


@dataclass(frozen=True)
class Rows:
    """What a data set gives for some samples, in their order, as stored.

    codes [b, i, j]; classes int32 [b] or None; conditions [b, k, l] or None; crops float32 [b, 5]
    and boxes of b views, see `CodeShard`, None unless they were asked for.
    """

    codes: np.ndarray
    classes: np.ndarray | None
    conditions: np.ndarray | None
    crops: np.ndarray | None = None
    boxes: Boxes | None = None

    def take(self, places: np.ndarray) -> "Rows":
        """Copies of the rows at `places` int64 [c]."""
        return Rows(
            self.codes.take(places, axis=0),
            None if self.classes is None else self.classes.take(places),
            None if self.conditions is None else self.conditions.take(places, axis=0),
            None if self.crops is None else self.crops.take(places, axis=0),
            None if self.boxes is None else self.boxes.take(places),
        )


class CodeDataset:
    """Code shards as one data set: `open` finds them and checks that they agree.

    A sample is one view of one image, so there are `num_samples` = images x views of them. The
    `facts` are what all shards have in common; `num_classes` is one more than the largest class id,
    0 without classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        facts: Mapping[str, Any],
        num_classes: int = 0,
        in_memory: bool = False,
    ) -> None:
        self.facts, self.class_names = facts, dataset.classes
        self.fingerprint, self.num_classes = dataset.fingerprint, num_classes
        self.tokenizer_fingerprint: str = facts["tokenizer"]["fingerprint"]
        self.vocabulary: int = facts["vocab"]
        self.grid: tuple[int, int] = (facts["grid"][0], facts["grid"][1])
        self.views: int = facts["views"]
        self.condition: Mapping[str, Any] | None = facts.get("condition")
        self.samples_per_shard = dataset.samples_per_shard * self.views
        self._dataset, self._paths, self._in_memory = dataset, dataset.paths, in_memory
        self._ends = np.cumsum(self.samples_per_shard)
        self._was_verified = np.zeros(len(dataset.shards), dtype=bool)
        self.shard = lru_cache(maxsize=None if in_memory else OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, spec: str | Sequence[str], in_memory: bool = False) -> "CodeDataset":
        """Open the code shards that a spec names.

        Raises `UserError` naming the folder or shard if one is missing, or comes from another
        tokenizer, vocabulary or grid than the first. Damage is found when a shard is first read.
        """
        dataset = resolve(spec, CODES_FORMAT)
        folders = list(dict.fromkeys(path.parent for path in dataset.paths))
        details = [Manifest.load(folder).details for folder in folders]
        known = [shared_facts(each, folder) for each, folder in zip(details, folders, strict=True)]
        for folder, facts in zip(folders, known, strict=True):
            check_agreement(folder, facts, folders[0], known[0])
        for column in (CLASSES, CONDITIONS, CROPS, BOXES):
            check_column(dataset, column)
        num_classes = max(number_of_classes(each, folders[0]) for each in details)
        found = cls(dataset, known[0], num_classes, in_memory)
        found.shard(0)
        return found

    @property
    def num_shards(self) -> int:
        """How many shards there are; `shard(k)` is the k-th."""
        return len(self._was_verified)

    @property
    def num_samples(self) -> int:
        """Images x views."""
        return int(self._ends[-1])

    @property
    def classes_present(self) -> bool:
        """Whether every image has a class."""
        return self._has(CLASSES)

    def require(self, columns: Sequence[str]) -> None:
        """Raise `UserError` if the data set lacks one of the columns of OPTIONS."""
        for column in columns:
            if not self._has(column):
                raise UserError(
                    f"the codes in {self._paths[0].parent} have no column {column}: run "
                    f"tools/tokenize_dataset.py with {OPTIONS[column]}, and another --out"
                )

    def check_classes(self) -> None:
        """Raise `UserError` naming the first image whose class no model can have."""
        check_classes(self._paths)

    def take(self, ids: np.ndarray, columns: Sequence[str] = ()) -> Rows:
        """The samples `ids` int64 [b]; each shard is visited once, its rows in ascending order.

        `columns`: which of OPTIONS are taken too; they must be there, see `require`.
        """
        rows, places = self.gather(ids, columns)
        return rows.take(places)

    def gather(self, ids: np.ndarray, columns: Sequence[str] = ()) -> tuple[Rows, np.ndarray]:
        """The samples `ids` int64 [b] in ascending order, and the place of each of `ids` in it."""
        order = np.argsort(ids, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(ids))
        ascending = ids[order]
        rows = self._take_ascending(ascending)
        if CROPS in columns:
            rows = replace(rows, crops=self._crops(ascending))
        if BOXES in columns:
            rows = replace(rows, boxes=self._boxes(ascending))
        return rows, places

    def keys(self, ids: np.ndarray) -> list[str]:
        """The names of the images that the samples `ids` int64 [b] are views of, ascending ids."""
        found: list[str] = []
        for number, _, samples in self._by_shard(np.sort(ids)):
            names = self.shard(number).keys[:]
            found += [names[sample // self.views] for sample in samples.tolist()]
        return found

    def _take_ascending(self, ids: np.ndarray) -> Rows:
        codes = np.empty((len(ids), *self.grid), codes_dtype(self.vocabulary))
        classes = np.empty(len(ids), np.int32) if self.classes_present else None
        conditions = None
        if self.condition is not None:
            shape = (len(ids), *self.condition["grid"])
            conditions = np.empty(shape, codes_dtype(self.condition["vocab"]))
        for number, where, samples in self._by_shard(ids):
            shard = self.shard(number)
            _copy_rows(shard.codes, samples, codes[where])
            if classes is not None and shard.classes is not None:
                classes[where] = shard.classes[samples // self.views]
            if conditions is not None and shard.conditions is not None:
                _copy_rows(shard.conditions, samples, conditions[where])
        return Rows(codes, classes, conditions)

    def _crops(self, ids: np.ndarray) -> np.ndarray:
        """Those of ascending `ids`, float32 [b, 5]."""
        crops = np.empty((len(ids), 5), np.float32)
        for number, where, samples in self._by_shard(ids):
            found = self.shard(number).crops
            assert found is not None
            crops[where] = found.reshape(-1, 5)[samples]
        return crops

    def _boxes(self, ids: np.ndarray) -> Boxes:
        """Those of ascending `ids`."""
        parts = []
        for number, _, samples in self._by_shard(ids):
            found = self.shard(number).boxes
            assert found is not None
            parts.append(found.take(samples))
        return Boxes.join(parts)

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Yield shard, where it is in ascending `ids`, and samples of it, for each shard needed."""
        if not len(ids):
            return
        owners = np.searchsorted(self._ends, ids, side="right")
        cuts = [0, *(np.flatnonzero(owners[1:] != owners[:-1]) + 1).tolist(), len(ids)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            number = int(owners[start])
            first = self._ends[number] - self.samples_per_shard[number]
            yield number, slice(start, stop), ids[start:stop] - first

    def _has(self, column: str) -> bool:
        return self._dataset.columns.get(column, 0) > 0

    def _open_shard(self, number: int) -> CodeShard:
        path, entry = self._paths[number], self._dataset.shards[number]
        if self._was_verified[number]:
            return CodeShard.open(path, self._in_memory)
        shard = open_verified(path, entry, self._in_memory)
        check_agreement(path, shared_facts(shard.facts, path), path.parent, self.facts)
        if any((name in shard.arrays) != self._has(name) for name in (CLASSES, CROPS, BOXES)):
            raise UserError(f"{path} has other columns than its manifest says: make it again")
        self._was_verified[number] = True
        return shard


def _copy_rows(column: np.ndarray, samples: np.ndarray, out: np.ndarray) -> None:
    """Copy the ascending `samples` of a shard's column to `out`."""
    views = column.reshape(-1, *out.shape[1:])
    if samples[-1] >= len(views):
        raise IndexError(f"sample {samples[-1]} of a shard that has {len(views)}")
    # Every mode but "raise" writes straight to `out`, which takes a tenth less time.
    views.take(samples, axis=0, out=out, mode="clip")


@dataclass(frozen=True)
class CodeBatch:
    """Codes int64 [b, i, j], classes int64 [b] or None, and sample ids int64 [b] (on the CPU).

    `conditions` int64 [b, k, l]: the codes of a second tokenizer, or None. None unless they were
    asked for: `crops` fp32 [b, 5]: left, top, width, height of what each sample shows as shares of
    its image, 1 if it is mirrored; `boxes` fp32 [m, 4]: left, top, width, height of the objects as
    shares of their sample, `box_classes` and `box_flags` int64 [m] (the bits of `objects.FLAGS`)
    and `box_ends` int64 [b]: those of sample k are the rows box_ends[k - 1] to box_ends[k].
    """

    codes: torch.Tensor
    classes: torch.Tensor | None
    ids: torch.Tensor
    conditions: torch.Tensor | None = None
    crops: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    box_classes: torch.Tensor | None = None
    box_flags: torch.Tensor | None = None
    box_ends: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)


class CodeReader:
    """The codes of a data set as this rank's batches, in the order that images are read in.

    `columns`: which of OPTIONS the batches have too; `UserError` if the data set lacks one.
    `most_evaluated`: see `Plan`.
    """

    def __init__(
        self,
        dataset: CodeDataset,
        *,
        seed: int = 0,
        lanes: int = 256,
        block: int = 256,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int,
        most_evaluated: int = 0,
        columns: Sequence[str] = (),
    ) -> None:
        dataset.require(columns)
        self.dataset, self._columns = dataset, tuple(columns)
        self.plan = Plan(
            dataset.samples_per_shard,
            dataset.fingerprint,
            seed,
            lanes,
            block,
            rank,
            world_size,
            micro_batch,
            most_evaluated=most_evaluated,
        )

    def batches(self, from_sample: int = 0) -> Iterator[CodeBatch]:
        """Endless batches for training, after `from_sample` samples were consumed by all ranks."""
        return self._read(self._gathering().training(from_sample))

    def epoch_batches(self) -> Iterator[CodeBatch]:
        """Every sample, or `most_evaluated` of them, once over all ranks, in order; the last batch
        may be short."""
        return self._read(self._gathering().evaluation())

    def keys(self, batch: CodeBatch) -> list[str]:
        """The names of the images that a batch's samples are views of."""
        return self.dataset.keys(batch.ids.numpy())

    def counts(self) -> dict[str, int]:
        """Nothing: codes that cannot be read end the run, see `Batching.counts`."""
        return {}

    def _gathering(self) -> Plan:
        """The plan whose batches are several of this reader's."""
        limit = min(GATHERED_SAMPLES, self.dataset.num_samples // self.plan.world_size)
        several = max(1, limit // self.plan.micro_batch)
        return replace(self.plan, micro_batch=several * self.plan.micro_batch)

    def _read(self, selections: Iterator[Selection]) -> Iterator[CodeBatch]:
        def gather(selection: Selection) -> tuple[np.ndarray, Rows, np.ndarray]:
            return selection.ids, *self.dataset.gather(selection.ids, self._columns)

        with closing(prefetched(gather, selections, threads=1, ahead=1)) as gathered:
            for ids, rows, places in gathered:
                for start in range(0, len(ids), self.plan.micro_batch):
                    part = slice(start, start + self.plan.micro_batch)
                    yield _batch(ids[part], rows.take(places[part]))


def _batch(ids: np.ndarray, rows: Rows) -> CodeBatch:
    boxes = rows.boxes
    return CodeBatch(
        codes=_tensor(rows.codes),
        classes=None if rows.classes is None else _tensor(rows.classes),
        ids=torch.from_numpy(ids),
        conditions=None if rows.conditions is None else _tensor(rows.conditions),
        crops=None if rows.crops is None else torch.from_numpy(rows.crops),
        boxes=None if boxes is None else torch.from_numpy(boxes.places),
        box_classes=None if boxes is None else _tensor(boxes.classes),
        box_flags=None if boxes is None else _tensor(boxes.flags),
        box_ends=None if boxes is None else _tensor(boxes.ends),
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
