import ast
import json
import math
from pathlib import Path

import pytest

from taming_dist.formats.strict_json import json_safe, write_json

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "taming_dist").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
DUMPS = ("json.dump", "json.dumps")
# What they make is hashed, compared, sent to a process of ours or given to Hydra as overrides; it
# is written nowhere.
NOT_WRITTEN = {
    "_stat",
    "checksum",
    "describe",
    "fingerprint",
    "fingerprint_of",
    "flatten",
    "scaled",
}
NOT_WRITTEN |= {"source", "start_child"}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_json_has_no_word_for_is_left_out_and_the_rest_stays(tmp_path: Path) -> None:
    record = {
        "psnr": math.inf,
        "loss": math.nan,
        "lr": 0.1,
        "box": (0.5, -math.inf),
        "deep": [{"x": math.nan, "y": 1}],
        "name": "caf\udce9 é",
        "none": None,
    }
    write_json(tmp_path / "a.json", record)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {
        "lr": 0.1,
        "box": [0.5, None],
        "deep": [{"y": 1}],
        "name": "caf\\xe9 é",
        "none": None,
    }
    assert json_safe(found) == found


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every json.dump and json.dumps of a module, with the function that it is in."""
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            found += [
                (function.name, node)
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and ast.unparse(node.func) in DUMPS
            ]
    return found


def test_all_json_that_is_written_is_strict() -> None:
    found = [(path, name, call) for path in SOURCES for name, call in calls(path)]
    assert len(found) > 10
    for path, name, call in found:
        strict = any(ast.unparse(word) == "allow_nan=False" for word in call.keywords)
        assert strict or name in NOT_WRITTEN, f"{path}: {name}"


@pytest.mark.parametrize("value", [3, "a", None, True, [1, [2]], {"a": {}}])
def test_what_is_json_stays_the_same(value: object) -> None:
    assert json_safe(value) == value
