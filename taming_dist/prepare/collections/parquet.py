"""Image tables as written by Hugging Face's `datasets`: parquet files with encoded images.

The image column is the one given by the table's metadata, or else the first one that is a struct
with `bytes`, or binary. Class labels come with their names; numbers and text go into the JSON.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taming_dist.errors import UserError
from taming_dist.formats.classes import is_missing, number_labels, whole_number
from taming_dist.formats.names import escape
from taming_dist.formats.strict_json import json_safe
from taming_dist.prepare.collections.entry import Collection, Entry, LeftOut, hidden, is_hidden
from taming_dist.prepare.collections.folders import require_file, walk_files

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

LABELS = ("label", "labels", "class", "cls")
ROWS = 64  # decoded at a time
WITHHELD = -1  # the class label in the test sets of `datasets`
WITHOUT_LABELS = "make shards without classes (--labels none)"


class ParquetTables(Collection):
    """The images of parquet files, or of all parquet files below a folder; names: `<table>/<row>`.

    Tables without rows are ignored, columns included. Labels are numbered by
    `classes.number_labels`, or ignored without `with_labels`.

    Raises:
        UserError: pyarrow is missing, a file is not a table of images, or a label is invalid.
    """

    def __init__(self, paths: Sequence[Path], with_labels: bool = True) -> None:
        super().__init__(", ".join(str(path) for path in paths))
        _require_pyarrow()
        self._left_out: list[LeftOut] = []
        self._tables: list[tuple[str, Path]] = []
        schemas: list[pyarrow.Schema] = []
        for table in (table for path in paths for table in self._find_tables(path)):
            with self._open(table[1]) as file:
                if file.metadata.num_rows:
                    self._tables.append(table)
                    schemas.append(file.schema_arrow)
        if not schemas:
            raise UserError(f"{self.where}: all tables are empty")
        self._features = _features(schemas[0])
        self._image = self._find_image(schemas[0])
        self._label = self._find_label(schemas) if with_labels else None
        self._facts = [
            field.name
            for field in schemas[0]
            if field.name not in (self._image, self._label, *LABELS) and _is_plain(field.type)
        ]
        self._ids: dict[Any, int] | None = None
        if self._label is not None:
            self._name_classes(self._label, schemas)

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        yield from self._left_out
        columns = [self._image, *([self._label] if self._label else []), *self._facts]
        for table, path in self._tables:
            for row, values in enumerate(self._rows(path, columns)):
                yield self._entry(f"{table}/{row:08d}.image", values)

    def _entry(self, name: str, values: dict[str, Any]) -> Entry | LeftOut:
        image = values[self._image]
        data = image["bytes"] if isinstance(image, dict) else image
        if data is None:
            return LeftOut(name, "missing", "the table holds no bytes for it")
        cls = None if self._label is None else self._class_id(name, values[self._label])
        facts = {key: values[key] for key in self._facts if values[key] is not None}
        return Entry(name, data, cls, facts=json_safe(facts))

    def _class_id(self, name: str, label: Any) -> int | None:
        if is_missing(label) or (label == WITHHELD and self._is_class_label):
            return None
        number = whole_number(label) if self._ids is None else self._ids[label]
        if number is None:
            raise UserError(
                f"{name}: its {self._label} is {label!r}, which is not a class: {WITHOUT_LABELS}"
            )
        return number

    @property
    def _is_class_label(self) -> bool:
        return self._features.get(self._label or "", {}).get("_type") == "ClassLabel"

    def _find_tables(self, path: Path) -> Iterator[tuple[str, Path]]:
        """Yield name and path of each table, sorted; the name is the path without `.parquet`."""
        if not path.is_dir():
            yield path.stem, require_file(path)
            return
        names = sorted(walk_files(path))
        self._left_out += [hidden(name) for name in names if name.endswith("/")]
        tables = [name for name in names if name.endswith(".parquet") and not is_hidden(name)]
        if not tables:
            raise UserError(f"{path}: no parquet file in this folder")
        for name in tables:
            yield name.removesuffix(".parquet"), path / name

    def _open(self, path: Path) -> "ParquetFile":
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is not a parquet table: {error}") from error

    def _rows(self, path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
        import pyarrow

        with self._open(path) as table:
            lacking = set(columns) - set(table.schema_arrow.names)
            if lacking:
                raise UserError(f"{path} lacks columns that other tables have: {sorted(lacking)}")
            try:
                for batch in table.iter_batches(ROWS, columns=columns):
                    yield from batch.to_pylist()
            except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
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
            raise UserError(f"{self._tables[0][1]} has no image column, only {schema.names}")
        return found[0]

    def _find_label(self, schemas: Sequence["pyarrow.Schema"]) -> str | None:
        """The label column: the first that can hold labels in every table that has it."""
        said = [name for name, kind in self._features.items() if kind.get("_type") == "ClassLabel"]
        unfit = ""
        for name in dict.fromkeys((*said, *LABELS)):
            kinds = _kinds(name, schemas)
            wrong = [kind for kind in kinds if not _is_label(kind)]
            if kinds and not wrong:
                return name
            if wrong and not unfit:
                unfit = f"the column {name!r} holds {wrong[0]}, not one class per image"
        if unfit:
            raise UserError(f"{self.where}: {unfit}: {WITHOUT_LABELS}")
        return None

    def _name_classes(self, label: str, schemas: Sequence["pyarrow.Schema"]) -> None:
        """Take class names from the metadata, or from the labels themselves if they are names."""
        names = self._features.get(label, {}).get("names")
        if names:
            self.classes = tuple(map(escape, names))
        elif any(_may_be_text(kind) for kind in _kinds(label, schemas)):
            rows = (row for _, path in self._tables for row in self._rows(path, [label]))
            try:
                numbering = number_labels({row[label] for row in rows})
            except ValueError as error:
                raise UserError(f"{self.where}: {error}, or {WITHOUT_LABELS}") from error
            self._ids, self.classes = numbering.ids, numbering.names


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError("--parquet needs pyarrow: pip install 'taming_dist[parquet]'") from error


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """The features that `datasets` records for the columns, by name."""
    said = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(said)["info"]["features"] if said else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _kinds(name: str, schemas: Sequence["pyarrow.Schema"]) -> list["pyarrow.DataType"]:
    """The types of a column in the tables, except where the whole column is null."""
    from pyarrow import types

    kinds = [schema.field(name).type for schema in schemas if name in schema.names]
    return [kind for kind in kinds if not types.is_null(kind)]


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _may_be_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return _is_text(kind) or types.is_dictionary(kind)


def _is_number(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    checks = (types.is_integer, types.is_floating, types.is_boolean)
    return any(check(kind) for check in checks)


def _is_label(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type can be labels: numbers, text, and categories of these."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_label(kind.value_type)
    return _is_number(kind) or _is_text(kind) or types.is_decimal(kind)


def _is_plain(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type can be written to JSON: numbers, text, and lists of these."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return _is_text(kind) or _is_number(kind)
