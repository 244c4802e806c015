"""Code shards on disk: one WebDataset sample of arrays in an uncompressed tar, memory-mapped.

A shard is `<name>.json`, `<name>.<column>.npy` and `<name>.keys.txt`; docs/data-formats.md has the
details. A shard that is damaged or differs from its manifest is refused and never read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash

from taming_dist.atomic import replacing
from taming_dist.errors import UserError
from taming_dist.formats.faults import BrokenData
from taming_dist.formats.manifest import CODES_FORMATS, Manifest, Shard
from taming_dist.formats.names import printable
from taming_dist.formats.npy import from_npy, to_npy
from taming_dist.formats.objects import Boxes
from taming_dist.formats.shards import TarWriter, map_file, measure, walk
from taming_dist.formats.strict_json import json_safe

CODES, CLASSES, SOURCES, CONDITIONS = "codes", "cls", "src", "cond"
CROPS, BOXES, BOX_CLASSES, BOX_ENDS = "crop", "boxes", "box_class", "box_ends"
BOX_FLAGS, TEXTS = "box_flags", "txt"
KEYS = "keys.txt"
# Facts that all shards of a data set share and that their manifest repeats.
SHARED_FACTS = ("tokenizer", "vocab", "grid", "views", "dtype", "condition", "text")
# What parsing damaged bytes as a tar, JSON and npy can raise.
DAMAGE = (BrokenData, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def codes_dtype(vocabulary: int) -> np.dtype:
    """The type that codes are stored in: uint16 where they fit, else int32."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32)


def format_of(shape: Sequence[int]) -> str:
    """The format of shards whose views have codes of this shape. A grid is written as it always
    was, so that folders of any age can be continued, and read by any version."""
    return CODES_FORMATS[len(shape) != 2]


@dataclass(frozen=True)
class CodeShard:
    """The contents of one code shard.

    `facts`: its json. `codes` [n, views, *shape], where a view's shape is (i, j), (levels, i, j) or
    (n,); `sources` int64 [n], the ids of the images in their data set; `keys`, their n names;
    `classes` int32 [n] or None; `conditions` [n, views, *shape], the codes of a second tokenizer,
    or None; `crops` float32 [n, views, 5]:
    left, top, width, height of each view as fractions of its image, 1 if it is mirrored, or None;
    `boxes` of the objects in each of the n x views, float32 fractions of the view, or None;
    `texts` float16 [n, tokens, width], embeddings whose vectors behind the end are zero, or None.
    """

    facts: dict[str, Any]
    codes: np.ndarray
    sources: np.ndarray
    keys: Sequence[str]
    classes: np.ndarray | None = None
    conditions: np.ndarray | None = None
    crops: np.ndarray | None = None
    boxes: Boxes | None = None
    texts: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by column name."""
        found = {
            CODES: self.codes,
            CLASSES: self.classes,
            SOURCES: self.sources,
            CONDITIONS: self.conditions,
            CROPS: self.crops,
            TEXTS: self.texts,
        }
        if self.boxes is not None:
            parts = (self.boxes.places, self.boxes.classes, self.boxes.ends)
            found |= dict(zip((BOXES, BOX_CLASSES, BOX_ENDS), parts, strict=True))
            # Most data sets have none, and shards older than this column stay valid.
            found[BOX_FLAGS] = self.boxes.flags if self.boxes.flags.any() else None
        return {name: array for name, array in found.items() if array is not None}

    def save(self, path: Path, writer: str = "") -> Shard:
        """Write the shard atomically; the same contents give the same bytes."""
        with replacing(path, writer) as file:
            return self.write(file, path.name)

    def write(self, file: BinaryIO, name: str) -> Shard:
        """Write the shard under the name `name`; return its entry for the manifest."""
        stem = Path(name).stem
        known = json_safe(self.complete_facts())
        facts = json.dumps(known, indent=1, sort_keys=True, allow_nan=False)
        tar = TarWriter(file)
        tar.add(f"{stem}.json", facts.encode())
        for column, array in self.arrays.items():
            tar.add(f"{stem}.{column}.npy", to_npy(array))
        tar.add(f"{stem}.{KEYS}", _join_keys(self.keys))
        digest = tar.finish()
        return Shard(name, len(self.codes), tar.bytes, digest, _counts(self.arrays, self.codes))

    def complete_facts(self) -> dict[str, Any]:
        """The given facts together with those derived from the arrays."""
        n, views, *grid = self.codes.shape
        columns = {
            name: {
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "xxh3_128": _digest(array),
            }
            for name, array in self.arrays.items()
        }
        return self.facts | {
            "format": format_of(grid),
            "n": n,
            "views": views,
            "grid": grid,
            "order": "raster",
            "dtype": self.codes.dtype.name,
            "columns": columns,
        }

    @classmethod
    def open(cls, path: Path, in_memory: bool = False) -> "CodeShard":
        """Map a shard into memory, or read it.

        Only its structure is checked; see `verify` for its contents.

        Raises:
            UserError: it is incomplete; names the file.
        """
        return cls.parse(_contents(path, in_memory), path)

    @classmethod
    def parse(cls, buffer: memoryview, path: Path) -> "CodeShard":
        """The shard in these bytes; `path` names it in errors."""
        try:
            files = {
                member.name.partition(".")[2]: buffer[member.start :][: member.size]
                for member in walk(buffer)
            }
            facts = json.loads(bytes(files["json"]))
            arrays = {
                name.removesuffix(".npy"): from_npy(data)
                for name, data in files.items()
                if name.endswith(".npy")
            }
            shard = cls(
                facts,
                codes=arrays[CODES],
                sources=arrays[SOURCES],
                keys=_Keys(files[KEYS]),
                classes=arrays.get(CLASSES),
                conditions=arrays.get(CONDITIONS),
                crops=arrays.get(CROPS),
                texts=arrays.get(TEXTS),
                boxes=_boxes(arrays) if BOXES in arrays else None,
            )
            shard._check(arrays)
        except DAMAGE as error:
            raise UserError(damaged(path, str(error) or type(error).__name__)) from error
        return shard

    def _check(self, arrays: Mapping[str, np.ndarray]) -> None:
        facts = self.facts
        if facts["format"] not in CODES_FORMATS or facts["format"] != format_of(facts["grid"]):
            raise ValueError(f"format {facts['format']!r}")
        if arrays.keys() != facts["columns"].keys() or arrays.keys() != self.arrays.keys():
            raise ValueError(f"columns {sorted(arrays)}")
        expected = self._expected()
        for name, array in arrays.items():
            said = facts["columns"][name]
            is_as_said = (array.dtype.name, list(array.shape)) == (said["dtype"], said["shape"])
            if not is_as_said or (array.dtype, array.shape) != expected[name]:
                raise ValueError(f"column {name} of shape {array.shape}, {array.dtype}")
        if not isinstance(facts["tokenizer"]["fingerprint"], str):
            raise ValueError("no fingerprint of its tokenizer")

    def _expected(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The dtypes and shapes that the columns must have according to the facts."""
        facts = self.facts
        n, views = facts["n"], facts["views"]
        forms = {
            CODES: (codes_dtype(facts["vocab"]), (n, views, *facts["grid"])),
            CLASSES: (np.dtype(np.int32), (n,)),
            SOURCES: (np.dtype(np.int64), (n,)),
            CROPS: (np.dtype(np.float32), (n, views, 5)),
        }
        if self.conditions is not None:
            condition = facts["condition"]
            forms[CONDITIONS] = codes_dtype(condition["vocab"]), (n, views, *condition["grid"])
        if self.texts is not None:
            text = facts["text"]
            forms[TEXTS] = np.dtype(np.float16), (n, text["tokens"], text["width"])
        if self.boxes is not None:
            count = len(self.boxes.places)
            forms[BOXES] = np.dtype(np.float32), (count, 4)
            forms[BOX_CLASSES] = np.dtype(np.int32), (count,)
            forms[BOX_FLAGS] = np.dtype(np.uint8), (count,)
            forms[BOX_ENDS] = np.dtype(np.int64), (n * views,)
        return forms

    def verify(self) -> str | None:
        """Read everything and return what is wrong with the contents, or None."""
        for name, array in self.arrays.items():
            if _digest(array) != self.facts["columns"][name]["xxh3_128"]:
                return f"the xxh3 of the column {name} differs from the one in the json"
        if len(self.keys) != len(self.codes):
            return f"{len(self.keys)} keys for {len(self.codes)} images"
        limits = {CODES: self.facts["vocab"]}
        if self.conditions is not None:
            limits[CONDITIONS] = self.facts["condition"]["vocab"]
        for name, vocabulary in limits.items():
            array = self.arrays[name]
            if array.size and not 0 <= array.min() <= array.max() < vocabulary:
                return f"{name} outside the range 0 to {vocabulary - 1}"
        if self.crops is not None and not ((self.crops >= 0) & (self.crops <= 1)).all():
            return "crop outside the range 0 to 1"
        if self.texts is not None and not np.isfinite(self.texts).all():
            return "txt with numbers that are not finite"
        return None if self.boxes is None else self.boxes.fault()


def _boxes(arrays: Mapping[str, np.ndarray]) -> Boxes:
    classes = arrays[BOX_CLASSES]
    flags = arrays.get(BOX_FLAGS, np.zeros(len(classes), np.uint8))
    return Boxes(arrays[BOXES], classes, flags, arrays[BOX_ENDS])


def open_verified(path: Path, entry: Shard, in_memory: bool = False) -> CodeShard:
    """Open a shard and read all of it once: its size, hash and rows must match `entry`.

    Raises:
        UserError: names the file and the fix.
    """
    buffer = _contents(path, in_memory)
    if (len(buffer), xxhash.xxh3_128_hexdigest(buffer)) != (entry.bytes, entry.xxh3_128):
        raise UserError(damaged(path, "its size or xxh3 differs from its manifest"))
    shard = CodeShard.parse(buffer, path)
    fault = shard.verify()
    if fault is None and len(shard.codes) != entry.samples:
        fault = f"{len(shard.codes)} rows, its manifest says {entry.samples}"
    if fault is not None:
        raise UserError(damaged(path, fault))
    return shard


def damaged(path: Path, fault: str) -> str:
    """The error line for a code shard that cannot be used."""
    return (
        f"the code shard {path} is damaged ({fault}): delete it and run "
        f"tools/tokenize_dataset.py again"
    )


def write_codes_manifest(
    folder: Path,
    names: Sequence[str],
    classes: tuple[str, ...] | None,
    writer: str = "",
    *,
    known: Mapping[str, Shard] | None = None,
    source_fingerprint: str | None = None,
) -> Manifest:
    """Write the manifest of a folder of finished code shards, which marks it as complete.

    It depends on the shards only, so several processes may write it at once. `known` entries are
    not measured again. `source_fingerprint` is that of the images' data set; if omitted, it is
    derived from those of the shards.
    """
    entries, bad, num_classes, facts = [], 0, 0, {}
    sources = hashlib.sha256()
    for name in names:
        shard = CodeShard.open(folder / name)
        facts = shard.facts
        entries.append(known[name] if known is not None else entry_of(folder / name, shard))
        bad += len(facts["source"]["bad"])
        sources.update(facts["source"]["fingerprint"].encode())
        if shard.classes is not None and len(shard.classes):
            num_classes = max(num_classes, 1 + int(shard.classes.max()))
    if not any(entry.samples for entry in entries):
        raise UserError(f"the code shards in {folder} are empty: no image could be read")
    details = {key: facts[key] for key in (*SHARED_FACTS, "preprocessing") if key in facts}
    details["num_classes"] = num_classes
    details["source"] = {
        "fingerprint": source_fingerprint or sources.hexdigest(),
        "bad": bad,
    }
    manifest = Manifest(format_of(facts["grid"]), tuple(entries), classes, details)
    manifest.save(folder, writer)
    return manifest


def entry_of(path: Path, shard: CodeShard) -> Shard:
    """The manifest's entry for an open shard; reads the whole file."""
    return Shard(path.name, len(shard.codes), *measure(path), _counts(shard.arrays, shard.codes))


def _counts(arrays: Mapping[str, np.ndarray], codes: np.ndarray) -> dict[str, int]:
    return dict.fromkeys(sorted(arrays), len(codes))


def _contents(path: Path, in_memory: bool) -> memoryview:
    try:
        return memoryview(path.read_bytes()) if in_memory else _map(path)
    except FileNotFoundError as error:
        raise UserError(damaged(path, "it is missing")) from error


def _map(path: Path) -> memoryview:
    """Map a file into memory, read-only, for as long as a view of it lives.

    torch maps it, because each of Python's own mappings holds a file descriptor, and a data set of
    many shards would exhaust the usual limit of 1024. (Python's are the fallback for names that are
    not UTF-8, which torch does not accept.)
    """
    if printable(str(path)) != str(path):
        return map_file(path)
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return memoryview(b"")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return mapped.numpy().data.toreadonly()


class _Keys(Sequence[str]):
    """The lines of keys.txt, split only when they are needed.

    Bytes that are not UTF-8, as in shards written before keys were escaped, are escaped here.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __len__(self) -> int:
        return int(np.count_nonzero(np.frombuffer(self._data, dtype=np.uint8) == ord("\n")))

    def __getitem__(self, index: Any) -> Any:
        return bytes(self._data).decode("utf-8", "backslashreplace").split("\n")[:-1][index]


def _join_keys(keys: Sequence[str]) -> bytes:
    for key in keys:
        if "\n" in key:
            raise UserError(f"the key {key!r} contains a line break: rename it in the image shards")
    return "".join(f"{printable(key)}\n" for key in keys).encode()


def _digest(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data)
