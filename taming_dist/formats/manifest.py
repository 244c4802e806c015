"""Which shards form a data set: `manifest.json`, the tar index, and the shard specs of users.

docs/data-formats.md documents the format. A manifest lies beside its shards, or names the URLs of
shards that lie elsewhere; a folder holds one data set. Everything on this machine is checked when
a spec is resolved, before anything is computed; the sizes of remote shards are checked when they
are read.
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

from taming_dist.access import require_readable
from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.formats import storage
from taming_dist.formats.names import printable
from taming_dist.formats.storage import MissingFile, Source, is_url, shown
from taming_dist.formats.strict_json import json_safe
from taming_dist.placeholders import refuse_placeholder

IMAGES_FORMAT = "taming_dist.images.v1"
CODES_FORMATS = ("taming_dist.codes.v1", "taming_dist.codes.v2")  # of a grid; of other shapes
MANIFEST = "manifest.json"
IDX = ".idx"  # appended to a shard's name
MANIFEST_LIMIT = 2**28  # bytes: about a million shards


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, samples, size, hash, and the number of samples with each column.

    `url` is its location if it does not lie beside its manifest.
    """

    name: str
    samples: int
    bytes: int
    xxh3_128: str
    columns: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def check(self) -> None:
        """Raise `ValueError` for impossible values, as found in damaged manifests."""
        counts = [self.samples, self.bytes, *self.columns.values()]
        if any(type(count) is not int or not 0 <= count < 2**63 for count in counts):
            raise ValueError(f"a shard with impossible counts {counts}")
        if any(count > self.samples for count in self.columns.values()):
            raise ValueError("a shard with more files than samples")
        if not is_file_name(self.name):
            raise ValueError("a shard whose name is not a plain file name")
        if not isinstance(self.xxh3_128, str) or not isinstance(self.url, str):
            raise ValueError("a shard whose hash or URL is not text")
        if self.url and not is_url(self.url):
            raise ValueError("a shard whose URL is invalid")
        storage.check_scheme(self.url)


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; `details` are facts from the tool that wrote the shards."""

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
            "shards": [_record(shard) for shard in self.shards],
        }
        if self.classes is not None:
            record["classes"] = list(map(printable, self.classes))
        if self.details:
            record["details"] = json_safe(self.details)
        # Not `write_json`: shards have the names of files, which may be any bytes.
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_bytes(folder / MANIFEST, text.encode(), writer)

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Read the manifest of a folder (a path or URL); `UserError` if missing or damaged."""
        location = storage.beside(str(folder), MANIFEST)
        try:
            data = storage.fetch(location, MANIFEST_LIMIT)
        except MissingFile as error:
            raise UserError(f"{shown(str(folder))} has no {MANIFEST}; {_fix(folder)}") from error
        try:
            return cls._parse(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{shown(location)} is damaged or was edited ({storage.one_line(error)}): "
                f"delete it, then {_fix(folder)}"
            ) from error

    @classmethod
    def _parse(cls, record: dict[str, Any]) -> "Manifest":
        """A manifest from its JSON; raises whatever Python raises for a malformed record."""
        shards = tuple(Shard(**shard) for shard in record["shards"])
        for shard in shards:
            shard.check()
        classes = record.get("classes")
        if classes is not None and not all(isinstance(name, str) for name in classes):
            raise ValueError("class names that are not text")
        manifest = cls(
            format=record["format"],
            shards=shards,
            # Before class names were escaped, some were written that UTF-8 cannot represent.
            classes=None if classes is None else tuple(map(printable, classes)),
            details=dict(record.get("details", {})),
        )
        if len(manifest.by_name) != len(shards):
            raise ValueError("two shards with the same name")
        sums = {
            "fingerprint": fingerprint(shards),
            "samples": sum(shard.samples for shard in shards),
            "columns": count_columns(shards),
        }
        for name, expected in sums.items():
            if record[name] != expected:
                raise ValueError(f"wrong {name}")
        return manifest


def is_file_name(name: Any) -> bool:
    """Whether an untrusted name is a plain file name, which cannot leave its folder."""
    plain = isinstance(name, str) and name not in ("", ".", "..")
    return plain and not any(sign in name for sign in "/\\\0") and len(name) < 256


def _record(shard: Shard) -> dict[str, Any]:
    record = asdict(shard)
    if not shard.url:
        del record["url"]
    return record


@dataclass(frozen=True)
class Part:
    """One data set of a mixture: how many of the shards belong to it, and its weight."""

    shards: int
    weight: int


@dataclass(frozen=True)
class Dataset:
    """The shards that a spec names, in order; samples are numbered consecutively from 0.

    `locations` and `indexes` are the paths or URLs of each shard and of its tar index. `parts` are
    the data sets of a mixture; if their classes disagree, class ids have no meaning.
    """

    locations: tuple[str, ...]
    shards: tuple[Shard, ...]
    indexes: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    classes_agree: bool = True
    parts: tuple[Part, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The shards as files on this machine; `UserError` if one of them lies elsewhere."""
        for location in self.locations:
            if is_url(location):
                raise UserError(
                    f"{shown(location)} is a URL, but these shards are read in place: copy them "
                    f"to this machine"
                )
        return tuple(Path(location) for location in self.locations)

    def open_shard(self, number: int) -> Source:
        """Open a shard for reading; a size that differs from its manifest is an error."""
        return storage.open_source(self.locations[number], self.shards[number].bytes)

    def read_index(self, number: int) -> np.ndarray:
        """The byte offsets of a shard's samples, int64 [samples + 1]."""
        return read_index(self.locations[number], self.shards[number], self.indexes[number])

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
        """A sha256 that changes when any shard, their order or a weight changes."""
        whole = fingerprint(self.shards)
        if not self.parts:
            return whole
        facts = [whole, [[part.shards, part.weight] for part in self.parts]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def columns(self) -> dict[str, int]:
        """The number of samples that have each column (the extension of its files)."""
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


def write_index(shard: Path, offsets: np.ndarray, writer: str = "") -> None:
    """Write the byte offsets of the samples [samples + 1] beside the shard, little-endian u64."""
    write_bytes(shard.with_name(shard.name + IDX), np.asarray(offsets, "<u8").tobytes(), writer)


def read_index(location: str, shard: Shard, index: str = "") -> np.ndarray:
    """The byte offsets of a shard's samples, int64 [samples + 1]; `index`: if not beside it."""
    index = index or storage.beside(storage.folder_of(location), storage.file_name(location) + IDX)
    size = 8 * (shard.samples + 1)
    try:
        raw = storage.fetch(index, size)
    except MissingFile as error:
        raise UserError(f"{shown(index)} is missing; {_reindex(location)}") from error
    except storage.TooLarge:
        raw = b""
    offsets = np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<u8").astype(np.int64)
    if len(raw) != size or not _is_sound(offsets, shard.bytes):
        raise UserError(f"{shown(index)} does not match its shard; {_reindex(location)}")
    return offsets


def _is_sound(offsets: np.ndarray, size: int) -> bool:
    """Headers are 512-byte blocks, so every sample starts on one and takes at least one."""
    within = offsets[0] >= 0 and offsets[-1] <= size
    return bool(within and not (offsets % 512).any() and (np.diff(offsets) >= 512).all())


def specs_of(given: Any) -> list[str]:
    """One shard spec or a list of them, as a list; `UserError` for anything else."""
    specs = [given] if isinstance(given, str) else given
    if isinstance(specs, list | tuple) and all(isinstance(spec, str) for spec in specs):
        return list(specs)
    shown = "null" if given is None else given
    raise UserError(
        f"{shown} is not a shard spec: give a folder, a glob, a brace expansion, a URL or a list "
        f"of these (a folder whose name is a number as ./2024)"
    )


def resolve(spec: str | Sequence[str], *formats: str) -> Dataset:
    """Find the shards that a spec names and check each against its manifest.

    A spec is a folder with a manifest, a glob, a brace expansion, one file, or a list of these;
    paths or URLs.

    Raises:
        UserError: no shard; one that is missing, in no manifest, of another size or format.
    """
    places = [place for single in specs_of(spec) for place in _expand(single)]
    if not places:
        raise UserError(f"the shard spec {spec!r} names no shards: give a folder, a glob or a list")
    manifests: dict[str, Manifest] = {}
    for folder, name in places:
        location = storage.beside(folder, name)
        if folder not in manifests:
            there = (location, storage.beside(folder, MANIFEST))
            if not is_url(folder) and not any(Path(file).is_file() for file in there):
                raise UserError(f"there is no shard {location}: fix the shard spec, or {_MAKE}")
            manifests[folder] = _load_checked(folder, formats or (IMAGES_FORMAT,))
    found = [_check(folder, name, manifests[folder]) for folder, name in places]
    return Dataset(
        locations=tuple(location for location, _ in found),
        shards=tuple(shard for _, shard in found),
        indexes=tuple(storage.beside(folder, name + IDX) for folder, name in places),
        classes=_common_classes(manifests),
    )


def _expand(spec: str) -> list[tuple[str, str]]:
    """Folders and names of the shards of one spec, in order: braces as written, globs sorted."""
    if not spec.strip():
        return []
    storage.check_scheme(spec)
    require_readable(spec)
    try:
        is_there = not is_url(spec) and Path(spec).exists()
        patterns = [spec] if is_there else list(braceexpand(spec))
    except ValueError as error:
        raise UserError(f"the shard spec {shown(spec)!r} has unbalanced braces") from error
    return [place for pattern in patterns for place in _expand_glob(pattern)]


def _expand_glob(pattern: str) -> list[tuple[str, str]]:
    is_there = not is_url(pattern) and Path(pattern).exists()
    found = storage.matching(pattern) if not is_there and _has_magic(pattern) else [pattern]
    if not found:
        raise UserError(f"no file matches {shown(pattern)}: fix the shard spec, or {_MAKE}")
    return [place for location in found for place in _shards_of(location)]


def _has_magic(pattern: str) -> bool:
    """Whether a path or URL is a glob; in an http URL the question mark has another meaning."""
    return "*" in pattern if pattern.startswith("http") else glob.has_magic(pattern)


def _shards_of(location: str) -> list[tuple[str, str]]:
    is_folder = (
        not storage.file_name(location).endswith(".tar")
        if is_url(location)
        else Path(location).is_dir()
    )
    if is_folder:
        return [(location, shard.name) for shard in Manifest.load(location).shards]
    return [(storage.folder_of(location), storage.file_name(location))]


def _load_checked(folder: str, formats: Sequence[str]) -> Manifest:
    manifest = Manifest.load(folder)
    if manifest.format not in formats:
        raise UserError(
            f"{shown(storage.beside(folder, MANIFEST))} has the format {manifest.format!r}, but "
            f"{formats[0]!r} is needed here"
        )
    return manifest


def _check(folder: str, name: str, manifest: Manifest) -> tuple[str, Shard]:
    """Location and manifest entry of a shard; files on this machine are checked."""
    entry = manifest.by_name.get(name)
    location = (entry.url if entry else "") or storage.beside(folder, name)
    require_readable(location)
    if not is_url(location) and not Path(location).is_file():
        raise UserError(f"there is no shard {location}: fix the shard spec, or {_MAKE}")
    if entry is None:
        raise UserError(
            f"the shard {shown(location)} is not in {shown(storage.beside(folder, MANIFEST))}; "
            f"{_reindex(location)}"
        )
    if not is_url(location) and Path(location).stat().st_size != entry.bytes:
        refuse_placeholder(location, "a shard")
        raise UserError(
            f"the shard {location} has {Path(location).stat().st_size} bytes but its manifest says "
            f"{entry.bytes}: it was truncated or changed; fetch it again, or {_reindex(location)}"
        )
    index = storage.beside(folder, name + IDX)
    if manifest.format == IMAGES_FORMAT and not is_url(index) and not Path(index).is_file():
        raise UserError(f"{index} is missing; {_reindex(location)}")
    return location, entry


def _common_classes(manifests: dict[str, Manifest]) -> tuple[str, ...] | None:
    """The class names if all folders have the same ones, None if none has; else `UserError`."""
    named = {folder: m.classes for folder, m in manifests.items() if m.classes is not None}
    if len(set(named.values())) > 1:
        folders = " and ".join(shown(folder) for folder in list(named)[:2])
        raise UserError(f"{folders} have different class names: their class ids do not agree")
    return next(iter(named.values())) if len(named) == len(manifests) else None


_MAKE = "make shards with: python tools/make_shards.py --images DIR --out DIR"


def _fix(folder: Path | str) -> str:
    if is_url(str(folder)):
        return _reindex(storage.beside(str(folder), "NAMES.tar"))
    if any(Path(folder).glob("*.tar")):
        return f"run: python tools/index_shards.py {folder}/*.tar"
    return _MAKE


def _reindex(location: str) -> str:
    command = f"run: python tools/index_shards.py {shown(location)}"
    return f"{command} --out DIR, and use DIR instead" if is_url(location) else command
