"""Tables of images as Hugging Face's `datasets` writes them: parquet files with encoded images.

The image column is the one that the table's metadata says, or else the first that is a struct with
`bytes`, or binary. Class labels come with their names; numbers and texts go into the json.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taming_dist.data.collections.entry import Collection, Entry, LeftOut
from taming_dist.data.collections.folders import require_file
from taming_dist.data.collections.lists import number_names
from taming_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

LABELS = ("label", "labels", "class", "cls")
ROWS = 64  # decoded at a time


class ParquetTables(Collection):
    """The images of parquet files, or of all below a folder; names are `<table>/<row>`.

    Labels that are texts are numbered sorted. Raises `UserError` if pyarrow is missing, or a file
    is no table of images.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(", ".join(str(path) for path in paths))
        _require_pyarrow()
        self._tables = [table for path in paths for table in _tables(path)]
        schema = self._open(self._tables[0][1]).schema_arrow
        self._features = _features(schema)
        self._image = self._find_image(schema)
        self._label = self._find_label(schema)
        self._texts = [
            field.name
            for field in schema
            if field.name not in (self._image, self._label, *LABELS) and _is_plain(field.type)
        ]
        self._ids: dict[str, int] | None = None
        if self._label is not None:
            self._name_classes(schema.field(self._label).type)

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        columns = [self._image, *([self._label] if self._label else []), *self._texts]
        for table, path in self._tables:
            row = 0
            for batch in self._batches(path, columns):
                for values in batch.to_pylist():
                    yield self._entry(f"{table}/{row:08d}.image", values)
                    row += 1

    def _entry(self, name: str, values: dict[str, Any]) -> Entry | LeftOut:
        image = values[self._image]
        data = image["bytes"] if isinstance(image, dict) else image
        if data is None:
            return LeftOut(name, "missing", "the table has no bytes for it")
        label = None if self._label is None else values[self._label]
        if self._ids is not None and label is not None:
            label = self._ids[label]
        # Test sets have -1 where labels are withheld.
        cls = label if label is not None and label >= 0 else None
        facts = {key: value for key in self._texts if _is_said(value := values[key])}
        return Entry(name, data, cls, facts=facts)

    def _open(self, path: Path) -> "ParquetFile":
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is no parquet table: {error}") from error

    def _batches(self, path: Path, columns: list[str]) -> Iterator["pyarrow.RecordBatch"]:
        import pyarrow

        table = self._open(path)
        lacking = set(columns) - set(table.schema_arrow.names)
        if lacking:
            raise UserError(f"{path} lacks columns that other tables have: {sorted(lacking)}")
        try:
            yield from table.iter_batches(ROWS, columns=columns)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def _find_image(self, schema: "pyarrow.Schema") -> str:
        from pyarrow import types

        said = [name for name, kind in self._features.items() if kind.get("_type") == "Image"]
        structs = [
            field.name
            for field in schema
            if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        binary = [
            field.name
            for field in schema
            if types.is_binary(field.type) or types.is_large_binary(field.type)
        ]
        found = [name for name in (*said, *structs, *binary) if name in schema.names]
        if not found:
            raise UserError(f"{self._tables[0][1]} has no column of images: {schema.names}")
        return found[0]

    def _find_label(self, schema: "pyarrow.Schema") -> str | None:
        from pyarrow import types

        said = [name for name, kind in self._features.items() if kind.get("_type") == "ClassLabel"]
        called = [
            name
            for name in LABELS
            if name in schema.names
            and (types.is_integer(schema.field(name).type) or _is_text(schema.field(name).type))
        ]
        return next(iter((*said, *called)), None)

    def _name_classes(self, kind: "pyarrow.DataType") -> None:
        """Class names from the metadata, or from the labels themselves if they are texts."""
        assert self._label is not None
        names = self._features.get(self._label, {}).get("names")
        if names:
            self.classes = tuple(names)
        elif _is_text(kind):
            batches = (
                batch for _, path in self._tables for batch in self._batches(path, [self._label])
            )
            found = {text for batch in batches for text in batch.column(0).to_pylist()} - {None}
            self._ids = number_names(found)
            self.classes = tuple(self._ids)


def _is_said(value: Any) -> bool:
    return value is not None and value == value  # NaN, which json does not know, is not


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError("--parquet needs pyarrow: pip install 'taming_dist[parquet]'") from error


def _tables(path: Path) -> list[tuple[str, Path]]:
    """Name and path of each table, sorted; the name is the path without `.parquet`."""
    if not path.is_dir():
        return [(path.stem, require_file(path))]
    found = sorted(path.rglob("*.parquet"))
    if not found:
        raise UserError(f"{path}: no parquet file below it")
    return [(table.relative_to(path).with_suffix("").as_posix(), table) for table in found]


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """What `datasets` notes about the columns, by name."""
    said = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(said)["info"]["features"] if said else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_plain(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type can stand in a json: numbers, texts, and lists of these."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return _is_text(kind) or any(
        check(kind) for check in (types.is_integer, types.is_floating, types.is_boolean)
    )
