"""Code shards: images as grids of code indices, columns of one array each, mapped into memory.

A shard is one WebDataset sample, `<name>.json` and `<name>.<column>.npy`, in an uncompressed tar;
docs/data-formats.md has the details. Stage 2 reads nothing else: no image, no encoder.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from omegaconf import MISSING

from taming_dist.data.faults import BrokenData
from taming_dist.data.files import replacing
from taming_dist.data.loader import Plan, Selection
from taming_dist.data.manifest import CODES_FORMAT, Manifest, Shard, resolve
from taming_dist.data.shards import TarWriter, measure, read_members
from taming_dist.errors import UserError

CODES, CLASSES, SOURCES, KEYS = "codes.npy", "cls.npy", "src.npy", "keys.txt"
SHARED_FACTS = ("tokenizer", "vocab", "grid", "views", "dtype")


@dataclass
class CodesConfig:
    """The `data` group of an experiment on codes; the names mean what they do in `ImagesConfig`.

    `vqgan`: export that wrote the codes; its decoder draws the previews, without it there are none.
    """

    train: str = MISSING
    val: str = MISSING
    global_batch: int = MISSING
    micro_batch: int = MISSING
    lanes: int = 256
    block: int = 256
    vqgan: str = ""


def codes_dtype(vocabulary: int) -> np.dtype:
    """The type that codes are stored in: uint16 where they fit, else int32."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32)


@dataclass(frozen=True)
class CodeShard:
    """The contents of one code shard.

    `facts`: its json. `codes` [n, views, i, j]; `sources` int64 [n], the ids of the images in
    their data set; `keys`, their n names; `classes` [n] or None.
    """

    facts: dict[str, Any]
    codes: np.ndarray
    sources: np.ndarray
    keys: Sequence[str]
    classes: np.ndarray | None = None

    def save(self, path: Path, writer: str = "") -> None:
        """Write the shard atomically; the same contents give the same bytes."""
        columns = {
            name: {
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "xxh3_128": _digest(array),
            }
            for name, array in self.arrays.items()
        }
        n, views, *grid = self.codes.shape
        facts = self.facts | {
            "format": CODES_FORMAT,
            "n": n,
            "views": views,
            "grid": grid,
            "order": "raster",
            "dtype": self.codes.dtype.name,
            "columns": columns,
        }
        with replacing(path, writer) as file:
            tar = TarWriter(file)
            tar.add(f"{path.stem}.json", json.dumps(facts, indent=1, sort_keys=True).encode())
            for name, array in self.arrays.items():
                tar.add(f"{path.stem}.{name}.npy", _to_npy(array))
            tar.add(f"{path.stem}.{KEYS}", "".join(f"{key}\n" for key in self.keys).encode())
            tar.finish()

    @classmethod
    def open(cls, path: Path) -> "CodeShard":
        """Map a shard into memory; `UserError` naming the file if it is not whole."""
        try:
            files = {name.partition(".")[2]: data for name, data in read_members(path).items()}
            facts = json.loads(bytes(files["json"]))
            shard = cls(
                facts,
                codes=_from_npy(files[CODES]),
                sources=_from_npy(files[SOURCES]),
                keys=bytes(files[KEYS]).decode().splitlines(),
                classes=_from_npy(files[CLASSES]) if CLASSES in files else None,
            )
            shard._check()
        except (BrokenData, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the code shard {path} is damaged ({error}): delete it and run "
                f"tools/tokenize_dataset.py again"
            ) from error
        return shard

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by column name."""
        found = {"codes": self.codes, "cls": self.classes, "src": self.sources}
        return {name: array for name, array in found.items() if array is not None}

    def _check(self) -> None:
        if self.facts["format"] != CODES_FORMAT:
            raise ValueError(f"format {self.facts['format']!r}")
        if self.codes.shape != (self.facts["n"], self.facts["views"], *self.facts["grid"]):
            raise ValueError(f"codes of shape {self.codes.shape}")
        if self.arrays.keys() != self.facts["columns"].keys():
            raise ValueError(f"columns {sorted(self.arrays)}")
        for name, array in self.arrays.items():
            if len(array) != self.facts["n"] or array.dtype.name != _column(self, name)["dtype"]:
                raise ValueError(f"column {name} of shape {array.shape}, {array.dtype}")
        if len(self.keys) != self.facts["n"]:
            raise ValueError(f"{len(self.keys)} keys")

    def verify(self) -> str | None:
        """Read everything; returns what is wrong with the contents, or None."""
        for name, array in self.arrays.items():
            if _digest(array) != _column(self, name)["xxh3_128"]:
                return f"the column {name} has another xxh3 than the json says"
        if self.codes.size and not 0 <= self.codes.min() <= self.codes.max() < self.facts["vocab"]:
            return f"codes outside of 0 .. {self.facts['vocab'] - 1}"
        return None


def _column(shard: CodeShard, name: str) -> dict[str, Any]:
    return shard.facts["columns"][name]


def _digest(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data)


def _to_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _from_npy(data: memoryview) -> np.ndarray:
    """The array in an npy file, as a view of it."""
    file = io.BytesIO(data[: 2**16])
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("npy of another version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype.hasobject:
        raise ValueError(f"npy of {dtype} in another order")
    count = int(np.prod(shape))
    return np.frombuffer(data, dtype=dtype, count=count, offset=file.tell()).reshape(shape)


def write_codes_manifest(
    folder: Path, names: Sequence[str], classes: tuple[str, ...] | None, writer: str = ""
) -> Manifest:
    """Write the manifest of a folder of whole code shards, its mark of completeness.

    Depends on the shards only, so several processes may write it at once.
    """
    shards, bad, kept = [], 0, {}
    for name in names:
        shard = CodeShard.open(folder / name)
        columns = dict.fromkeys(sorted(shard.arrays), len(shard.codes))
        size, digest = measure(folder / name)
        shards.append(Shard(name, len(shard.codes), size, digest, columns))
        bad += len(shard.facts["source"]["bad"])
        kept = {key: shard.facts[key] for key in (*SHARED_FACTS, "preprocessing")}
        kept["source"] = {"fingerprint": shard.facts["source"]["fingerprint"], "bad": bad}
    if not any(shard.samples for shard in shards):
        raise UserError(f"the code shards in {folder} are empty: no image could be read")
    manifest = Manifest(CODES_FORMAT, tuple(shards), classes, kept)
    manifest.save(folder, writer)
    return manifest


class CodeDataset:
    """Code shards as one data set: `open` maps them all and checks that they agree.

    A sample is one view of one image, so there are `num_samples` = images x views of them.
    """

    def __init__(
        self,
        shards: Sequence[CodeShard],
        fingerprint: str = "",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.shards, self.fingerprint, self.class_names = tuple(shards), fingerprint, class_names
        facts = shards[0].facts
        self.tokenizer_fingerprint: str = facts["tokenizer"]["fingerprint"]
        self.vocabulary: int = facts["vocab"]
        self.grid: tuple[int, int] = (facts["grid"][0], facts["grid"][1])
        self.views: int = facts["views"]
        self.classes_present = shards[0].classes is not None
        self.samples_per_shard = np.array([len(s.codes) * self.views for s in shards])
        self._ends = np.cumsum(self.samples_per_shard)

    @classmethod
    def open(cls, spec: str | Sequence[str]) -> "CodeDataset":
        """Open the code shards that a spec names.

        Raises `UserError` naming the shard if one is missing or damaged, or comes from
        another tokenizer, vocabulary or grid than the first.
        """
        dataset = resolve(spec, CODES_FORMAT)
        shards = [CodeShard.open(path) for path in dataset.paths]
        for path, shard in zip(dataset.paths, shards, strict=True):
            for fact in SHARED_FACTS:
                if shard.facts[fact] != shards[0].facts[fact]:
                    raise UserError(
                        f"{path} and {dataset.paths[0]} do not go together: their {fact} is "
                        f"{shard.facts[fact]} and {shards[0].facts[fact]}"
                    )
            if (shard.classes is None) != (shards[0].classes is None):
                raise UserError(f"only one of {path} and {dataset.paths[0]} has classes")
        return cls(shards, dataset.fingerprint, dataset.classes)

    @property
    def num_samples(self) -> int:
        """Images x views."""
        return int(self._ends[-1])

    @cached_property
    def num_classes(self) -> int:
        """One more than the largest class id; 0 without classes."""
        columns = [shard.classes for shard in self.shards if shard.classes is not None]
        return 1 + max((int(column.max()) for column in columns if column.size), default=-1)

    def take(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes int64 [b, i, j] and classes int64 [b] of the samples `ids` int64 [b]."""
        codes = np.empty((len(ids), *self.grid), dtype=np.int64)
        classes = np.empty(len(ids), dtype=np.int64) if self.classes_present else None
        owners = np.searchsorted(self._ends, ids, side="right")
        for owner in np.unique(owners):
            here = owners == owner
            shard = self.shards[owner]
            first = self._ends[owner] - self.samples_per_shard[owner]
            rows, views = np.divmod(ids[here] - first, self.views)
            codes[here] = shard.codes[rows, views]
            if classes is not None and shard.classes is not None:
                classes[here] = shard.classes[rows]
        return codes, classes


@dataclass(frozen=True)
class CodeBatch:
    """Codes int64 [b, i, j], classes int64 [b] or None, and sample ids int64 [b] (on the CPU)."""

    codes: torch.Tensor
    classes: torch.Tensor | None
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def to(self, device: torch.device | str) -> "CodeBatch":
        """The same batch with its tensors on `device`."""
        classes = None if self.classes is None else self.classes.to(device, non_blocking=True)
        return replace(self, codes=self.codes.to(device, non_blocking=True), classes=classes)


class CodeReader:
    """The codes of a data set as this rank's batches, in the order that images are read in."""

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
    ) -> None:
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
        )

    def batches(self, from_sample: int = 0) -> Iterator[CodeBatch]:
        """Endless batches for training, after `from_sample` samples were consumed by all ranks."""
        return map(self._load, self.plan.training(from_sample))

    def epoch_batches(self) -> Iterator[CodeBatch]:
        """Every sample once over all ranks, in order; the last batch may be short."""
        return map(self._load, self.plan.evaluation())

    def state(self, samples: int) -> dict[str, Any]:
        """See `Plan.state`."""
        return self.plan.state(samples)

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Plan.check_state`."""
        self.plan.check_state(state)

    def _load(self, selection: Selection) -> CodeBatch:
        codes, classes = self.dataset.take(selection.ids)
        # An index past the embedding is a crash without a name, on a GPU even a poisoned context.
        if codes.max() >= self.dataset.vocabulary or codes.min() < 0:
            raise UserError(
                f"a code outside of 0 .. {self.dataset.vocabulary - 1} was read: find the "
                f"damaged shard with tools/verify_shards.py"
            )
        return CodeBatch(
            codes=torch.from_numpy(codes),
            classes=None if classes is None else torch.from_numpy(classes),
            ids=torch.from_numpy(selection.ids),
        )
