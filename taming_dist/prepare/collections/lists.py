"""A list of images: one path per line (.txt), a table with a header (.csv, .tsv), or .jsonl.

A table has the field `path` and may have `label` (class ids or names), `segmentation`, `depth`,
`edges` and `low_resolution` (paths). All other fields go into the sample's JSON.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from taming_dist.errors import UserError
from taming_dist.formats.classes import is_missing, number_labels
from taming_dist.formats.strict_json import json_safe
from taming_dist.prepare.collections.entry import Collection, Entry, LeftOut, is_image, no_image
from taming_dist.prepare.collections.folders import require_file, require_folder

PATH, LABEL = "path", "label"
PAIRS = {"segmentation": "seg", "depth": "depth", "edges": "edges", "low_resolution": "lr"}
Row = dict[str, Any]


class ImageList(Collection):
    """The images that a list names, relative to a folder (by default the list's own).

    Labels are numbered by `classes.number_labels`, or ignored without `with_labels`. Raises
    `UserError` naming the faulty line.
    """

    def __init__(self, path: Path, root: Path | None = None, with_labels: bool = True) -> None:
        super().__init__(str(path))
        self.path = require_file(path)
        self._root = require_folder(root or path.parent)
        if path.suffix.lower() not in PARSERS:
            raise UserError(f"{path}: the name of a list must end in {', '.join(PARSERS)}")
        self._with_labels = with_labels
        labels = {row.get(LABEL) for _, row in self._rows()}
        try:
            numbering = number_labels(labels)
        except ValueError as error:
            raise UserError(
                f"{path}: {error}, or make shards without classes (--labels none)"
            ) from error
        self._ids, self.classes = numbering.ids, numbering.names

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        for number, row in self._rows():
            path = row.pop(PATH)
            name = os.path.normpath(path).replace(os.sep, "/")
            cls = self._class_id(row.pop(LABEL, None), number)
            pairs = {PAIRS[field]: self._root / row.pop(field) for field in PAIRS if field in row}
            if is_image(name):
                yield Entry(name, self._root / path, cls, pairs, json_safe(row))
            else:
                yield no_image(name)

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """Yield the number and the non-empty fields of every line that is not empty."""
        number = 0
        try:
            with open(
                self.path, encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as file:
                for number, row in PARSERS[self.path.suffix.lower()](file):
                    filled = {key: value for key, value in row.items() if not is_missing(value)}
                    if not self._with_labels:
                        filled.pop(LABEL, None)
                    fault = _fault(filled)
                    if fault:
                        raise UserError(f"{self.path}, line {number}: {fault}")
                    yield number, filled
        except (ValueError, csv.Error) as error:
            raise UserError(f"{self.path}, after line {number}: {error}") from error

    def _class_id(self, label: Any, number: int) -> int | None:
        if not self._ids:
            return None
        if label is None:
            raise UserError(f"{self.path}, line {number}: no label, but other lines have one")
        return self._ids[label]


def _fault(row: Row) -> str:
    """What is wrong with a line, or an empty string."""
    if not isinstance(row.get(PATH), str):
        return f"no field {PATH!r}"
    if not isinstance(row.get(LABEL, 0), int | float | str):
        return f"{LABEL!r} is neither a number nor text"
    if "cls" in row:
        return f"a field 'cls': rename it to {LABEL!r}"
    if None in row:
        return "more values than the header has fields"
    if not all(isinstance(row[field], str) for field in PAIRS if field in row):
        return f"{', '.join(PAIRS)} must be paths"
    if any("\0" in row.get(field, "") for field in (PATH, *PAIRS)):
        return "a path with a zero byte"
    if not all(map(_is_path, (row.get(field, "") for field in (PATH, *PAIRS)))):
        return "a path with half of a surrogate pair, which no file can have"
    return ""


def _is_path(text: str) -> bool:
    """Whether text can be a path: undecodable bytes can, half of a surrogate pair cannot."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, {PATH: line.strip("\r\n")}


def _table(delimiter: str, file: TextIO) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    for row in reader:
        yield reader.line_num, row


def _objects(file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            yield number, row


PARSERS: dict[str, Callable[[TextIO], Iterator[tuple[int, Row]]]] = {
    ".txt": _lines,
    ".csv": partial(_table, ","),
    ".tsv": partial(_table, "\t"),
    ".jsonl": _objects,
}
