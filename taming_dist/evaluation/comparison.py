"""Figures of several evaluations side by side, which have to be of the same protocol."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json


def side_by_side(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """The figures in the metrics.json of `folders`, in their order, None where one has it not; by
    name, after which the hash of their protocol stands.

    Raises:
        UserError: a figure has another protocol in one folder than in another, or a file is
            missing, or of before figures had protocols.
    """
    return {
        name: values
        for name, values in compared(folders).items()
        if not any(isinstance(value, list | dict) for value in values)
    }


def by_class(folders: Sequence[Path]) -> dict[str, list[list[Any]]]:
    """The same of the figures that are lists in the order of the classes' numbers; empty where one
    has it not."""
    found = {
        name: [value if isinstance(value, list) else [] for value in values]
        for name, values in compared(folders).items()
        if name.partition(" ")[0].endswith("_by_class")
    }
    return {name: values for name, values in found.items() if any(values)}


def compared(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Figures of any form, as `side_by_side` has them."""
    records = [record_of(folder) for folder in folders]
    rows: dict[str, list[Any]] = {}
    known: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for column, (folder, record) in enumerate(zip(folders, records, strict=True)):
        for protocol in record["protocols"]:
            for name in protocol["figures"]:
                first, before = known.setdefault(name, (folder, protocol))
                if before["hash"] != protocol["hash"]:
                    raise UserError(
                        f"{name} of {first} and of {folder} do not compare: their protocols "
                        f"{before['hash']} and {protocol['hash']} differ in "
                        f"{difference(before, protocol)}; evaluate both alike"
                    )
                row = rows.setdefault(f"{name} ({protocol['hash']})", [None] * len(folders))
                row[column] = record.get(name)
    return rows


def record_of(folder: Path) -> dict[str, Any]:
    """The metrics.json of a folder; `UserError` if there is none with protocols."""
    file = folder / "metrics.json"
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("protocols"), list):
        raise UserError(f"{file} does not say under which protocols: evaluate again")
    return record


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what two protocols differ, by its name."""
    return ", ".join(differing(one, other)) or "version"


def differing(one: Mapping[str, Any], other: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Each entry of one that the other has otherwise, and both values; those of mappings inside by
    their path."""
    for name, value in one.items():
        theirs = other.get(name)
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            yield from differing(value, theirs, f"{within}{name}.")
        elif name not in ("hash", "figures") and value != theirs:
            yield f"{within}{name} ({value}, {theirs})"
