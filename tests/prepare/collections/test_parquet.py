import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from taming_dist.errors import UserError
from taming_dist.prepare.collections.entry import Entry, LeftOut
from taming_dist.prepare.collections.parquet import ParquetTables


def jpeg(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (10, 10), (value, 0, 0)).save(out, "JPEG")
    return out.getvalue()


IMAGES = [{"bytes": jpeg(value), "path": f"{value}.jpg"} for value in range(3)]


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    table = pyarrow.table(columns)
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)
    return path


def test_a_table_of_hugging_face_has_images_and_named_classes(tmp_path: Path) -> None:
    features = {
        "photo": {"_type": "Image"},
        "kind": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "caption": {"dtype": "string", "_type": "Value"},
    }
    columns = {"kind": [1, 0, -1], "caption": ["a", "b", None], "photo": IMAGES}
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}.parquet", columns, features)
    tables = ParquetTables([tmp_path / "data"])
    assert tables.classes == ("cat", "dog")
    found = list(tables)
    assert len(found) == 6
    assert isinstance(first := found[3], Entry)
    assert (first.name, first.image, first.cls) == (
        "train-00001/00000000.image", IMAGES[0]["bytes"], 1,
    )  # fmt: skip
    assert first.facts == {"caption": "a"}
    assert isinstance(last := found[5], Entry)
    assert (last.cls, last.facts) == (None, {})


def test_a_plain_table_of_bytes_with_text_labels(tmp_path: Path) -> None:
    columns = {"img": [jpeg(1), None], "label": ["dog", "cat"], "size": [[1, 2], [3, 4]]}
    tables = ParquetTables([write(tmp_path / "a.parquet", columns)])
    assert tables.classes == ("cat", "dog")
    first, second = tables
    assert isinstance(first, Entry)
    assert (first.cls, first.facts) == (1, {"size": [1, 2]})
    assert isinstance(second, LeftOut)
    assert second.kind == "missing"


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"no table")
    whole = write(tmp_path / "a.parquet", {"image": IMAGES})
    text = write(tmp_path / "b.parquet", {"text": ["a"]})
    for paths, message in (
        ([tmp_path / "empty"], "no parquet file in this folder"),
        ([tmp_path / "none.parquet"], "there is no such file"),
        ([tmp_path / "x.parquet"], "x.parquet is not a parquet table"),
        ([text], "has no image column"),
        ([whole, text], "b.parquet lacks columns"),
    ):
        with pytest.raises(UserError, match=message):
            list(ParquetTables(paths))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'taming_dist\[parquet\]'"):
        ParquetTables([whole])


def test_damage_inside_a_table_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(ParquetTables([path]))


def classes_of(tables: ParquetTables) -> list[int | None]:
    return [entry.cls for entry in tables if isinstance(entry, Entry)]


LABELS = {
    "whole floats": ([2.0, 0.0, None], [2, 0, None], None),
    "categories": (pyarrow.array(["k10", "k9", None]).dictionary_encode(), [1, 0, None],
                   ("k9", "k10")),
    "categories of numbers": (pyarrow.array([7, 5, 7]).dictionary_encode(), [7, 5, 7], None),
    "bools": ([True, False, None], [1, 0, None], None),
    "string_view": (pyarrow.array(["b", "a", "b"], pyarrow.string_view()), [1, 0, 1], ("a", "b")),
    "numeric texts": (["0", "2", "10"], [0, 2, 10], None),
    "decimals": (pyarrow.array([3, 1, None], pyarrow.decimal128(5, 2)), [3, 1, None], None),
    "names": (["class 10", "class 2", ""], [1, 0, None], ("class 2", "class 10")),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_scalar_type_become_classes(tmp_path: Path, kind: str) -> None:
    labels, classes, names = LABELS[kind]
    tables = ParquetTables([write(tmp_path / "a.parquet", {"image": IMAGES, "label": labels})])
    assert (classes_of(tables), tables.classes) == (classes, names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0], [1], [2]], r"'label' holds list<.*>, not one class per image.*--labels none"),
        ([0.5, 1.0, 2.0], r"a/00000000\.image: its label is 0\.5, which is not a class"),
        ([0, 1, 2**33], r"a/00000002\.image: the class 8589934592 is outside the range 0 to"),
        ([0, -1, 2], r"a/00000001\.image: the class -1 is outside the range 0 to"),
        (["0.5", "1", "2"], r"'0\.5' is not a class"),
    ],
)
def test_labels_that_are_no_classes_are_one_line_or_not_read(
    tmp_path: Path, labels: list[Any], message: str
) -> None:
    path = write(tmp_path / "a.parquet", {"image": IMAGES, "label": labels})
    with pytest.raises(UserError, match=message):
        list(ParquetTables([path]))
    assert classes_of(ParquetTables([path], with_labels=False)) == [None] * 3


def test_tables_without_rows_say_nothing(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": pyarrow.array([]), "label": pyarrow.array([])})
    write(tmp_path / "1.parquet", {"image": IMAGES, "label": [2, 0, 1]})
    write(tmp_path / "2.parquet", {"image": IMAGES, "label": pyarrow.nulls(3)})
    assert classes_of(ParquetTables([tmp_path])) == [2, 0, 1, None, None, None]
    with pytest.raises(UserError, match=r"0\.parquet: all tables are empty"):
        ParquetTables([tmp_path / "0.parquet"])


def test_tables_whose_labels_have_different_types_agree_or_are_one_line(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": IMAGES, "label": [2, 0, 1]})
    write(tmp_path / "1.parquet", {"image": IMAGES, "label": ["10", "1", None]})
    write(tmp_path / "2.parquet", {"image": IMAGES, "label": [3.0, None, 0.0]})
    tables = ParquetTables([tmp_path])
    assert classes_of(tables) == [2, 0, 1, 10, 1, None, 3, None, 0]
    write(tmp_path / "3.parquet", {"image": IMAGES, "label": ["cat", "1", "2"]})
    with pytest.raises(UserError, match="is a number, but 'cat' is a name"):
        ParquetTables([tmp_path])
    write(tmp_path / "3.parquet", {"image": IMAGES, "label": [[1], [2], [3]]})
    with pytest.raises(UserError, match="the column 'label' holds list"):
        ParquetTables([tmp_path])


def test_a_column_of_lists_gives_way_to_one_of_classes(tmp_path: Path) -> None:
    columns = {"image": IMAGES, "labels": [2, 0, 1], "label": [[1], [2], [3]]}
    assert classes_of(ParquetTables([write(tmp_path / "a.parquet", columns)])) == [2, 0, 1]


def test_facts_are_json_whatever_the_table_holds(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    columns = {
        "image": IMAGES,
        "score": [0.5, nan, inf],
        "box": [[1.0, nan], [inf], []],
        "split": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
    }
    tables = ParquetTables([write(tmp_path / "a.parquet", columns)])
    assert [entry.facts for entry in tables if isinstance(entry, Entry)] == [
        {"score": 0.5, "box": [1.0, None], "split": "a"},
        {"box": [None], "split": "b"},
        {"box": [], "split": "a"},
    ]


def test_tables_in_hidden_folders_are_left_out_and_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": IMAGES})
    write(tmp_path / ".cache" / "b.parquet", {"image": IMAGES})
    found = list(ParquetTables([tmp_path]))
    assert [e.name for e in found if isinstance(e, LeftOut)] == [".cache/"]
    assert len(found) == 4


def test_text_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    broken = pyarrow.StringArray.from_buffers(
        3,
        pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1],
        pyarrow.py_buffer(b"a\xe9b"),
    )
    path = write(tmp_path / "a.parquet", {"image": IMAGES, "caption": broken})
    with pytest.raises(UserError, match=r"a\.parquet is damaged: .*utf-8"):
        list(ParquetTables([path]))
