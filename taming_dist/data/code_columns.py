"""The columns of code shards as stage 2 reads them, by their names on disk (docs/data-formats.md).

A condition names those that it reads (`models.prior.conditions.Condition.columns`); no other is
read. A new column is one line in COLUMNS.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from taming_dist.formats.code_shards import (
    BOX_CLASSES,
    BOX_ENDS,
    BOX_FLAGS,
    BOXES,
    CLASSES,
    CODES,
    CONDITIONS,
    CROPS,
    TEXTS,
    CodeShard,
)
from taming_dist.formats.objects import Boxes

Rows = dict[str, Any]  # by column, in the order of the samples: an array [b, ...], or `Boxes`


class Column(ABC):
    """How the rows of some samples (views of images) are brought together, and become tensors.

    `origin`: where the column comes from, for those who lack it.
    """

    origin: str

    @abstractmethod
    def part(self, shard: CodeShard, samples: np.ndarray, views: int) -> Any:
        """The rows of the samples int64 [b], counted within the shard."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> Any:
        """The rows of several shards, one after the other."""

    @abstractmethod
    def take(self, rows: Any, places: np.ndarray) -> Any:
        """Copies of the rows at `places` int64 [c]."""

    @abstractmethod
    def tensors(self, name: str, rows: Any) -> dict[str, torch.Tensor]:
        """The rows as tensors by name; whole numbers become int64."""


@dataclass(frozen=True)
class ArrayColumn(Column):
    """A row for each view, [n, views, ...] in the shard, or `of_image`: for each image [n, ...]."""

    array: Callable[[CodeShard], np.ndarray | None]
    origin: str
    of_image: bool = False

    def part(self, shard: CodeShard, samples: np.ndarray, views: int) -> np.ndarray:
        found = self.array(shard)
        assert found is not None, "the data set was asked whether it has the column"
        if self.of_image:
            return found.take(samples // views, axis=0)
        return found.reshape(-1, *found.shape[2:]).take(samples, axis=0)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def take(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        return rows.take(places, axis=0)

    def tensors(self, name: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: as_tensor(rows)}


@dataclass(frozen=True)
class BoxColumn(Column):
    """Any number of objects for each view: four tensors, see `formats.objects.Boxes`.

    `boxes` fp32 [m, 4]: left, top, width, height as shares of their sample; `box_class` and
    `box_flags` int64 [m]; `box_ends` int64 [b]: those of sample k are the rows box_ends[k - 1] to
    box_ends[k].
    """

    origin: str

    def part(self, shard: CodeShard, samples: np.ndarray, views: int) -> Boxes:
        assert shard.boxes is not None, "the data set was asked whether it has the column"
        return shard.boxes.take(samples)

    def join(self, parts: Sequence[Boxes]) -> Boxes:
        return Boxes.join(parts)

    def take(self, rows: Boxes, places: np.ndarray) -> Boxes:
        return rows.take(places)

    def tensors(self, name: str, rows: Boxes) -> dict[str, torch.Tensor]:
        return {
            name: as_tensor(rows.places),
            BOX_CLASSES: as_tensor(rows.classes),
            BOX_FLAGS: as_tensor(rows.flags),
            BOX_ENDS: as_tensor(rows.ends),
        }


def as_tensor(rows: np.ndarray) -> torch.Tensor:
    """Rows as a tensor of their own memory, whole numbers as int64."""
    whole = np.issubdtype(rows.dtype, np.integer)
    return torch.from_numpy(rows.astype(np.int64) if whole else rows)


# name on disk -> how it is read. codes [b, *shape]; cls [b]; cond [b, *shape], codes of a
# second tokenizer; crop fp32 [b, 5]: left, top, width, height of what each sample shows as shares
# of its image, 1 if it is mirrored; txt fp16 [b, t, w], the embedding of a text, zero behind its
# end.
COLUMNS: dict[str, Column] = {
    CODES: ArrayColumn(lambda shard: shard.codes, "tokenize_dataset.py"),
    CLASSES: ArrayColumn(lambda shard: shard.classes, "image shards with classes", of_image=True),
    CONDITIONS: ArrayColumn(lambda shard: shard.conditions, "--condition-model EXPORT"),
    CROPS: ArrayColumn(lambda shard: shard.crops, "--coordinates"),
    BOXES: BoxColumn("--boxes"),
    TEXTS: ArrayColumn(lambda shard: shard.texts, "--text COLUMN", of_image=True),
}


def tensors(rows: Rows) -> dict[str, torch.Tensor]:
    """The rows of some samples as tensors by name: what a batch is made of."""
    found: dict[str, torch.Tensor] = {}
    for name, part in rows.items():
        found |= COLUMNS[name].tensors(name, part)
    return found


def rows_at(rows: Rows, places: np.ndarray) -> Rows:
    """Copies of the rows at `places` int64 [c], column by column."""
    return {name: COLUMNS[name].take(part, places) for name, part in rows.items()}
