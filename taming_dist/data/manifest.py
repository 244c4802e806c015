"""Which shards make a data set: `manifest.json`, the tar index, and the shard spec users type.

The format is written down in docs/data-formats.md. A manifest lies beside its shards; a folder
holds one data set. Everything is checked when a spec is resolved, before anything is computed.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from taming_dist.data.files import write_bytes
from taming_dist.errors import UserError

IMAGES_FORMAT = "taming_dist.images.v1"
CODES_FORMAT = "taming_dist.codes.v1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, number of samples, size, hash, and how many samples have a column."""

    name: str
    samples: int
    bytes: int
    xxh3_128: str
    columns: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; `details` are facts of the tool that wrote the shards."""

    format: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Shard]:
        """The shards by file name."""
        return {shard.name: shard for shard in self.shards}

    def save(self, folder: Path, writer: str = "") -> None:
        """Write `folder/manifest.json` atomically; the same contents give the same bytes."""
        record: dict[str, Any] = {
            "format": self.format,
            "samples": sum(shard.samples for shard in self.shards),
            "columns": count_columns(self.shards),
            "fingerprint": fingerprint(self.shards),
            "shards": [asdict(shard) for shard in self.shards],
        }
        if self.classes is not None:
            record["classes"] = list(self.classes)
        if self.details:
            record["details"] = self.details
        write_bytes(folder / MANIFEST, (json.dumps(record, indent=1) + "\n").encode(), writer)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `folder/manifest.json`; a `UserError` names the file if it is missing or damaged."""
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} has no {MANIFEST}; {_mend(folder)}")
        try:
            record = json.loads(path.read_text())
            manifest = cls(
                format=record["format"],
                shards=tuple(Shard(**shard) for shard in record["shards"]),
                classes=tuple(record["classes"]) if "classes" in record else None,
                details=record.get("details", {}),
            )
            if any(Path(shard.name).name != shard.name for shard in manifest.shards):
                raise ValueError("a shard that is no plain file name")
            whole = record["fingerprint"] == fingerprint(manifest.shards)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: delete it, then {_mend(folder)}") from error
        if not whole:
            raise UserError(f"{path} was edited (wrong sum): delete it, then {_mend(folder)}")
        return manifest


@dataclass(frozen=True)
class Dataset:
    """The shards that a spec names, in order; the samples are numbered through from 0."""

    paths: tuple[Path, ...]
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None = None

    @cached_property
    def samples_per_shard(self) -> np.ndarray:
        """Number of samples of each shard, int64 [shards]."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @cached_property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return int(self.samples_per_shard.sum())

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 that changes when any shard, or their order, does."""
        return fingerprint(self.shards)

    @cached_property
    def columns(self) -> dict[str, int]:
        """For each column (the extension of its files) the number of samples that have it."""
        return count_columns(self.shards)


def fingerprint(shards: Iterable[Shard]) -> str:
    """The sha256 over name, samples, bytes and xxh3 of the shards, in order."""
    facts = [[shard.name, shard.samples, shard.bytes, shard.xxh3_128] for shard in shards]
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def count_columns(shards: Iterable[Shard]) -> dict[str, int]:
    """Add up how many samples have each column."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard.columns)
    return dict(sorted(total.items()))


def index_path(shard: Path) -> Path:
    """Where the tar index of a shard lies."""
    return shard.with_name(shard.name + ".idx")


def write_index(shard: Path, offsets: np.ndarray) -> None:
    """Write the byte offsets of the samples [samples + 1] beside the shard, little-endian u64."""
    write_bytes(index_path(shard), np.asarray(offsets, dtype="<u8").tobytes())


def read_index(shard: Path, samples: int) -> np.ndarray:
    """Read the byte offsets of a shard's samples, int64 [samples + 1]."""
    path = index_path(shard)
    mend = f"run: python tools/index_shards.py {shard}"
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {mend}") from error
    offsets = np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<u8").astype(np.int64)
    # Headers are 512-byte blocks, so every sample starts on one and takes at least two.
    if len(raw) != 8 * (samples + 1) or offsets[0] < 0 or bool((np.diff(offsets) < 1024).any()):
        raise UserError(f"{path} does not fit its shard; {mend}")
    return offsets


def resolve(spec: str | Sequence[str], format: str = IMAGES_FORMAT) -> Dataset:
    """Find the shards that a spec names and check each against its manifest.

    A spec is a folder with a manifest, a glob, a brace expansion, one file, or a list of these.
    Raises `UserError` naming the file and the mend if there is no shard, a shard is missing, in
    no manifest, of another size than its manifest says, or of another `format`.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    paths = [path for single in specs for path in _expand(single)]
    if not paths:
        raise UserError(f"the shard spec {spec!r} names no shards: give a folder, a glob or a list")
    manifests: dict[Path, Manifest] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no shard {path}: mend the shard spec, or {_MAKE}")
        if path.parent not in manifests:
            manifests[path.parent] = _load_checked(path.parent, format)
    shards = tuple(_check(path, manifests[path.parent]) for path in paths)
    return Dataset(tuple(paths), shards, _common_classes(manifests))


def _expand(spec: str) -> list[Path]:
    """All files that one spec names, in order: braces as written, globs sorted."""
    if "://" in spec or spec.startswith("pipe:"):
        raise UserError(f"the shard spec {spec!r} is a URL: only local paths can be read for now")
    if not spec.strip():
        return []
    try:
        patterns = [spec] if Path(spec).exists() else list(braceexpand(spec))
    except ValueError as error:
        raise UserError(f"the shard spec {spec!r} has unbalanced braces") from error
    return [path for pattern in patterns for path in _expand_glob(pattern)]


def _expand_glob(pattern: str) -> list[Path]:
    if Path(pattern).exists() or not glob.has_magic(pattern):
        found = [pattern]
    else:
        found = sorted(glob.glob(pattern))
    if not found:
        raise UserError(f"no file matches {pattern}: mend the shard spec, or {_MAKE}")
    return [path for name in found for path in _shards_of(Path(name))]


def _shards_of(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / shard.name for shard in Manifest.load(path).shards]
    return [path]


def _load_checked(folder: Path, format: str) -> Manifest:
    manifest = Manifest.load(folder)
    if manifest.format != format:
        raise UserError(
            f"{folder / MANIFEST} is of format {manifest.format!r}, but {format!r} is needed here"
        )
    return manifest


def _check(path: Path, manifest: Manifest) -> Shard:
    """The manifest's entry of a shard, after a look at the file itself."""
    entry = manifest.by_name.get(path.name)
    if entry is None:
        raise UserError(
            f"the shard {path} is not in {path.parent / MANIFEST}; "
            f"run: python tools/index_shards.py {path}"
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise UserError(
            f"the shard {path} has {size} bytes but its manifest says {entry.bytes}: it was cut "
            f"or changed; fetch it again, or run: python tools/index_shards.py {path}"
        )
    if manifest.format == IMAGES_FORMAT and not index_path(path).is_file():
        raise UserError(f"{index_path(path)} is missing; run: python tools/index_shards.py {path}")
    return entry


def _common_classes(manifests: dict[Path, Manifest]) -> tuple[str, ...] | None:
    """The class names, if all folders have the same ones; else a `UserError` or None."""
    named = {folder: m.classes for folder, m in manifests.items() if m.classes is not None}
    if len(set(named.values())) > 1:
        folders = " and ".join(str(folder) for folder in list(named)[:2])
        raise UserError(f"{folders} have different class names: their class ids do not agree")
    return next(iter(named.values())) if len(named) == len(manifests) else None


_MAKE = "make shards with: python tools/make_shards.py --images DIR --out DIR"


def _mend(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return f"run: python tools/index_shards.py {folder}/*.tar"
    return _MAKE
