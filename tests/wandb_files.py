"""What the offline file of a W&B run holds, which `wandb sync` would send."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """An artifact that a run has logged, or has `used`."""

    name: str
    digest: str
    used: bool
    facts: dict[str, Any]
    files: frozenset[str]


def records(folder: Path, kind: str) -> list[Any]:
    """The records of one kind of all runs in a run directory, from the first start on."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    return found


def history(folder: Path) -> list[Line]:
    """Every call of `log` but for previews: names of nested values are joined by slashes."""
    found = []
    for record in records(folder, "history"):
        items = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.item
        }
        if not any(key.startswith("preview/") for key in items):
            found.append({key: value for key, value in items.items() if key[0] != "_"})
    return found


def artifacts(folder: Path) -> list[Told]:
    """What the runs of a run directory have used and logged, in this order."""
    return [
        Told(
            name=record.name,
            digest=record.digest,
            used=record.use_after_commit,
            facts=json.loads(record.metadata or "{}"),
            files=frozenset(entry.path for entry in record.manifest.contents),
        )
        for record in records(folder, "artifact")
    ]


def _records(path: Path) -> Iterator[bytes]:
    """The records of a file: a header of 7 bytes, then LevelDB's log format."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""
