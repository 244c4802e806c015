import json
from pathlib import Path

import pytest

from taming_dist.errors import UserError
from taming_dist.prepare.collections.entry import Entry, LeftOut
from taming_dist.prepare.collections.lists import ImageList


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def entries(path: Path, root: Path | None = None) -> list[Entry]:
    found = list(ImageList(path, root))
    assert all(isinstance(entry, Entry) for entry in found)
    return found  # type: ignore[return-value]


def test_a_text_file_names_an_image_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "b/one image.jpg\r\n\n/abs/two.PNG\n./b/../three.webp\n")
    assert [(entry.name, entry.image) for entry in entries(path)] == [
        ("b/one image.jpg", tmp_path / "b/one image.jpg"),
        ("/abs/two.PNG", Path("/abs/two.PNG")),
        ("three.webp", tmp_path / "b/../three.webp"),
    ]


def test_paths_start_from_the_root_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    path = write(tmp_path, "a.txt", "one.jpg\n")
    assert entries(path, tmp_path / "photos")[0].image == tmp_path / "photos/one.jpg"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_have_labels_pairs_and_facts(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"path": "a.jpg", "label": "dog", "segmentation": "m/a.png", "caption": "a dog, wet"},
        {"path": "b.jpg", "label": "cat", "segmentation": "m/b.png", "caption": ""},
    ]
    if suffix == ".jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        mark = "," if suffix == ".csv" else "\t"
        lines = [list(rows[0]), *([f'"{value}"' for value in row.values()] for row in rows)]
        text = "\ufeff" + "\r\n".join(mark.join(line) for line in lines)
    path = write(tmp_path, f"a{suffix}", text)
    first, second = entries(path)
    assert ImageList(path).classes == ("cat", "dog")
    assert (first.cls, second.cls) == (1, 0)
    assert first.pairs == {"seg": tmp_path / "m/a.png"}
    assert first.facts == {"caption": "a dog, wet"}
    assert second.facts == {}


def test_numbers_are_class_ids(tmp_path: Path) -> None:
    table = write(tmp_path, "a.csv", "path,label\na.jpg,10\nb.jpg,9\n")
    assert [entry.cls for entry in entries(table)] == [10, 9]
    assert ImageList(table).classes is None
    lines = write(tmp_path, "a.jsonl", '{"path": "a.jpg", "label": 0}\n')
    assert [entry.cls for entry in entries(lines)] == [0]


def test_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "a.gif\nb.jpg\n")
    assert [type(entry) for entry in ImageList(path)] == [LeftOut, Entry]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,label\na.jpg,1\n", "line 2: no field 'path'"),
        ("a.csv", "path\na.jpg,1\n", "more values than the header"),
        ("a.csv", 'path\n"a.jpg\n', "a.csv, after line 0"),
        ("a.csv", "path,label\na.jpg,1\nb.jpg,\n", "line 3: no label"),
        ("a.csv", "path,cls\na.jpg,1\n", "rename it to 'label'"),
        ("a.jsonl", '{"path": "a.jpg"}\n{"path": \n', "after line 1"),
        ("a.jsonl", '["a.jpg"]\n', "not a JSON object"),
        ("a.jsonl", '{"path": 3}\n', "no field 'path'"),
        ("a.jsonl", '{"path": "a.jpg", "label": [1]}\n', "line 1: 'label' is"),
        ("a.jsonl", '{"path": "a.jpg", "depth": 3}\n', "must be paths"),
        ("a.csv", "path,label\na.jpg,-1\n", "a.jpg: the class -1 is outside the range 0 to"),
        ("a.jsonl", '{"path": "a.jpg", "label": 8589934592}\n', "a.jpg: the class 8589934592 is"),
        ("a.csv", "path,label\na.jpg,0.5\nb.jpg,1\n", r"'0\.5' is not a class.*--labels none"),
        ("a.jsonl", '{"path": "a.jpg", "label": 0.5}\n', r"0\.5 is not a class.*--labels none"),
        ("a.jsonl", '{"path": "a", "label": 1}\n{"path": "b", "label": "k"}', "1 is a number, but"),
        ("a.jsonl", '{"path": "\\ud800.jpg"}\n', "line 1: a path with half of a surrogate pair"),
        ("a.jsonl", '{"path": "a\\u0000.jpg"}\n', "a path with a zero byte"),
        ("a.xlsx", "", "end in .txt, .csv, .tsv, .jsonl"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(UserError, match=message):
        list(ImageList(path))


def test_labels_are_numbers_of_any_spelling_or_names_in_natural_order(tmp_path: Path) -> None:
    spelled = write(tmp_path, "a.csv", "path,label\na.jpg,2.0\nb.jpg,10\n")
    assert [entry.cls for entry in entries(spelled)] == [2, 10]
    lines = '{"path": "a.jpg", "label": 2.0}\n{"path": "b.jpg", "label": true}\n'
    assert [entry.cls for entry in entries(write(tmp_path, "b.jsonl", lines))] == [2, 1]
    names = write(tmp_path, "c.csv", "path,label\na.jpg,k10\nb.jpg,k2\n")
    assert ImageList(names).classes == ("k2", "k10")


def test_labels_need_not_be_read(tmp_path: Path) -> None:
    lines = '{"path": "a.jpg", "label": [1]}\n{"path": "b.jpg", "label": -3}\n'
    found = list(ImageList(write(tmp_path, "a.jsonl", lines), with_labels=False))
    assert [(e.cls, e.facts) for e in found if isinstance(e, Entry)] == [(None, {}), (None, {})]


def test_facts_are_json_whatever_the_list_holds(tmp_path: Path) -> None:
    line = '{"path": "a.jpg", "score": NaN, "box": [0, -Infinity, 1e999], "size": {"x": NaN}}\n'
    (entry,) = entries(write(tmp_path, "a.jsonl", line))
    assert entry.facts == {"box": [0, None, None], "size": {}}
    (tmp_path / "b.csv").write_bytes(b"path,caption\ncaf\xe9.jpg,un caf\xe9\n")
    (entry,) = entries(tmp_path / "b.csv")
    assert entry.facts == {"caption": "un caf\\xe9"}
    assert entry.name == "caf\udce9.jpg"
