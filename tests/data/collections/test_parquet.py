import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from taming_dist.data.collections.entry import Entry, LeftOut
from taming_dist.data.collections.parquet import ParquetTables
from taming_dist.errors import UserError


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
        ([tmp_path / "empty"], "no parquet file below it"),
        ([tmp_path / "none.parquet"], "there is no such file"),
        ([tmp_path / "x.parquet"], "x.parquet is no parquet table"),
        ([text], "has no column of images"),
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
