"""Reads codes for stage 2: a data set of code shards, and this rank's batches of it.

Nothing is held per sample: shards are mapped when they are first needed, checked whole once, and
the least recently used are closed again. Stage 2 reads nothing else: no image, no encoder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taming_dist.data.batching import DataConfig
from taming_dist.data.code_columns import COLUMNS, Rows, rows_at, tensors
from taming_dist.data.plan import Plan, Selection, prefetched
from taming_dist.errors import UserError
from taming_dist.formats.agreement import (
    check_agreement,
    check_classes,
    check_column,
    number_of_classes,
    shared_facts,
)
from taming_dist.formats.code_shards import CLASSES, CODES, CodeShard, open_verified
from taming_dist.formats.manifest import CODES_FORMATS, Dataset, Manifest, resolve

# Enough for the lanes of a rank to stay in their shards; a system allows some 65,000 mappings.
OPEN_SHARDS = 512
# Samples gathered in one go: the cost of finding out which ones are next is shared by many.
GATHERED_SAMPLES = 4096


@dataclass
class CodesConfig(DataConfig):
    """The `data` group of an experiment on codes.

    `vqgan`: export that wrote the codes; its decoder draws the previews, without it there are none.
    `condition_vqgan`: export that wrote the condition's codes; previews then show them, too.
    `in_memory`: read shards into memory and keep them, where the disk is slow and they fit.
    """

    in_memory: bool = False
    vqgan: str = ""
    condition_vqgan: str = ""


@dataclass(frozen=True)
class Origin:
    """The images that codes were made of, which every tokenizer of the same images shares.

    `fingerprint` of their data set, of parts of several one that differs where any of it does;
    `views`: the crops of each; `resize`: how these were resized. Empty where manifests do not say.
    """

    fingerprint: str = ""
    views: str = ""
    resize: str = ""


class CodeDataset:
    """Code shards as one data set: `open` finds them and checks that they agree.

    A sample is one view of one image, so there are `num_samples` = images x views of them. The
    `facts` are what all shards have in common; `num_classes` is one more than the largest class id,
    0 without classes; `grid` is the shape of a sample's codes; `image_size` is the side in pixels
    of the square images that were coded, None where the manifest does not say it; `origin` tells
    which images these are.
    """

    def __init__(
        self,
        dataset: Dataset,
        facts: Mapping[str, Any],
        num_classes: int = 0,
        in_memory: bool = False,
        image_size: int | None = None,
        origin: Origin = Origin(),
    ) -> None:
        self.facts, self.class_names = facts, dataset.classes
        self.fingerprint, self.num_classes = dataset.fingerprint, num_classes
        self.image_size, self.origin = image_size, origin
        self.tokenizer_fingerprint: str = facts["tokenizer"]["fingerprint"]
        self.vocabulary: int = facts["vocab"]
        self.grid: tuple[int, ...] = tuple(facts["grid"])
        self.views: int = facts["views"]
        self.condition: Mapping[str, Any] | None = facts.get("condition")
        self.text: Mapping[str, Any] | None = facts.get("text")
        self.samples_per_shard = dataset.samples_per_shard * self.views
        self._dataset, self._paths, self._in_memory = dataset, dataset.paths, in_memory
        self._ends = np.cumsum(self.samples_per_shard)
        self._was_verified = np.zeros(len(dataset.shards), dtype=bool)
        self.shard = lru_cache(maxsize=None if in_memory else OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, spec: str | Sequence[str], in_memory: bool = False) -> "CodeDataset":
        """Open the code shards that a spec names; damage is found when a shard is first read.

        Raises:
            UserError: one is missing, or comes from another tokenizer, vocabulary or grid than the
                first; names the folder or shard.
        """
        dataset = resolve(spec, *CODES_FORMATS)
        folders = list(dict.fromkeys(path.parent for path in dataset.paths))
        manifests = {folder: Manifest.load(folder) for folder in folders}
        details = [manifest.details for manifest in manifests.values()]
        known = [shared_facts(each, folder) for each, folder in zip(details, folders, strict=True)]
        for folder, facts in zip(folders, known, strict=True):
            check_agreement(folder, facts, folders[0], known[0])
        for column in COLUMNS:
            check_column(dataset, column)
        num_classes = max(number_of_classes(each, folders[0]) for each in details)
        side, origin = image_size(details[0]), origin_of(dataset.paths, manifests)
        found = cls(dataset, known[0], num_classes, in_memory, side, origin)
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
        """Raise `UserError` if the data set lacks one of `columns`, which are of COLUMNS."""
        for column in columns:
            if not self._has(column):
                raise UserError(
                    f"the codes in {self._paths[0].parent} have no column {column}: run "
                    f"tools/tokenize_dataset.py with {COLUMNS[column].origin}, and another --out"
                )

    def check_classes(self) -> None:
        """Raise `UserError` naming the first image whose class no model can have."""
        check_classes(self._paths)

    def take(self, ids: np.ndarray, columns: Sequence[str] = ()) -> Rows:
        """The samples `ids` int64 [b]: the rows of their codes, and of `columns`, by name.

        Each shard is visited once, its rows in ascending order. See `require`.
        """
        rows, places = self.gather(ids, columns)
        return rows_at(rows, places)

    def gather(self, ids: np.ndarray, columns: Sequence[str] = ()) -> tuple[Rows, np.ndarray]:
        """The samples `ids` int64 [b] in ascending order, and the place of each of `ids` in it."""
        order = np.argsort(ids, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(ids))
        parts: dict[str, list[Any]] = {name: [] for name in (CODES, *columns)}
        for number, samples in self._by_shard(ids[order]):
            shard = self.shard(number)
            for name, found in parts.items():
                found.append(COLUMNS[name].part(shard, samples, self.views))
        return {name: COLUMNS[name].join(found) for name, found in parts.items()}, places

    def samples(self, ids: range, columns: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of `columns` of consecutive samples."""
        return tensors(self.take(np.array(ids, np.int64), columns))

    def keys(self, ids: np.ndarray) -> list[str]:
        """The names of the images that the samples `ids` int64 [b] are views of, ascending ids."""
        found: list[str] = []
        for number, samples in self._by_shard(np.sort(ids)):
            names = self.shard(number).keys[:]
            found += [names[sample // self.views] for sample in samples.tolist()]
        return found

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a shard and the ascending `ids` in it, counted within it, for each
        shard needed; for no ids none of the first."""
        owners = np.searchsorted(self._ends, ids, side="right")
        cuts = [0, *(np.flatnonzero(owners[1:] != owners[:-1]) + 1).tolist(), len(ids)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            number = int(owners[start]) if len(ids) else 0
            first = self._ends[number] - self.samples_per_shard[number]
            yield number, ids[start:stop] - first

    def _has(self, column: str) -> bool:
        return self._dataset.columns.get(column, 0) > 0

    def _open_shard(self, number: int) -> CodeShard:
        path, entry = self._paths[number], self._dataset.shards[number]
        if self._was_verified[number]:
            return CodeShard.open(path, self._in_memory)
        shard = open_verified(path, entry, self._in_memory)
        check_agreement(path, shared_facts(shard.facts, path), path.parent, self.facts)
        if any((name in shard.arrays) != self._has(name) for name in COLUMNS):
            raise UserError(f"{path} has other columns than its manifest says: make it again")
        self._was_verified[number] = True
        return shard


def image_size(details: Mapping[str, Any]) -> int | None:
    """The side in pixels of the images that were coded, as a manifest says it."""
    preprocessing = details.get("preprocessing")
    size = preprocessing.get("size") if isinstance(preprocessing, dict) else None
    return size if type(size) is int and size > 0 else None


def origin_of(paths: Sequence[Path], manifests: Mapping[Path, Manifest]) -> Origin:
    """The images that the shards `paths` were made of, as the manifests of their folders say it."""
    parts = []
    for folder, manifest in manifests.items():
        named = [path.name for path in paths if path.parent == folder]
        whole = named == list(manifest.by_name)
        parts.append((_origin(manifest.details), None if whole else named))
    first, some = parts[0]
    if len(parts) == 1 and some is None:
        return first
    facts = json.dumps([[vars(origin), some] for origin, some in parts], allow_nan=False)
    return replace(first, fingerprint=hashlib.sha256(facts.encode()).hexdigest())


def _origin(details: Mapping[str, Any]) -> Origin:
    """What one manifest says."""
    source, preprocessing = details.get("source"), details.get("preprocessing")
    fingerprint = source.get("fingerprint") if isinstance(source, dict) else ""
    known = preprocessing if isinstance(preprocessing, dict) else {}
    views = known.get("views")
    names = ", ".join(map(str, views)) if isinstance(views, list) else ""
    return Origin(str(fingerprint or ""), names, str(known.get("resize", "")))


@dataclass(frozen=True)
class CodeBatch:
    """The columns of some samples by name, `codes` int64 [b, *shape] and those that were asked for
    (see `code_columns.COLUMNS`), and sample ids int64 [b]; on the CPU. `coded` [b], of codes that
    were just made on a device and lie there: whether an image has all of them (None: all do)."""

    columns: Mapping[str, torch.Tensor]
    ids: torch.Tensor
    coded: torch.Tensor | None = None

    @property
    def codes(self) -> torch.Tensor:
        return self.columns[CODES]

    def __len__(self) -> int:
        return len(self.ids)


class CodeReader:
    """The codes of a data set as this rank's batches, in the order that images are read in.

    `columns`: which of COLUMNS the batches have beside the codes; `UserError` if the data set lacks
    one.
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
                    yield batch_of(ids[part], rows_at(rows, places[part]))


def batch_of(ids: np.ndarray, rows: Rows) -> CodeBatch:
    """The batch of samples `ids` int64 [b]: here its tensors are made."""
    return CodeBatch(tensors(rows), torch.from_numpy(ids))
