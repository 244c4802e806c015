import argparse
import ast
import runpy
import sys
from pathlib import Path

import pytest

from taming_dist import cli

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (8.3, "8.3 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7625, "2 h 07 min"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert cli.duration(seconds) == text


@pytest.mark.parametrize("tool", ["make_shards", "verify_shards", "index_shards"])
def test_a_wrong_argument_is_one_line_and_code_2(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, "--bogus"])
    with pytest.raises(SystemExit) as ended:
        cli.run(runpy.run_path(str(TOOLS / f"{tool}.py"))["main"])
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("error: ")
    assert error.endswith("; see --help for all arguments\n")


def test_other_errors_stay_loud_but_for_those_whose_traceback_is_in_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A permission that no file lacks, as of the system, is not the user's to fix."""
    for error in (ValueError("a\nbug"), PermissionError(1, "Operation not permitted")):
        with pytest.raises(type(error)), cli.one_line():
            raise error
        with pytest.raises(SystemExit) as ended, cli.one_line(tmp_path / "rank-0.log"):
            raise error
        assert ended.value.code == 1
        text = " ".join(str(error).split())
        assert capsys.readouterr().err == (
            f"error: {type(error).__name__}: {text} (traceback in {tmp_path / 'rank-0.log'})\n"
        )


@pytest.mark.parametrize(
    ("kind", "limits", "text", "found"),
    [
        (int, {"at_least": 1}, "1", 1),
        (int, {"at_least": 1}, "0", "'0' is invalid: use a whole number from 1"),
        (int, {"at_least": 1}, "1.5", "'1.5' is invalid: use a whole number from 1"),
        (float, {"above": 0, "below": 1}, "0.25", 0.25),
        (float, {"above": 0, "below": 1}, "1", "'1' is invalid: use a number above 0 and below 1"),
        (float, {"at_least": 0}, "nan", "'nan' is invalid: use a number from 0"),
        (float, {"at_least": 0}, "inf", "'inf' is invalid: use a number from 0"),
    ],
)
def test_an_argument_that_is_a_number_has_a_range(
    kind: type, limits: dict[str, float], text: str, found: float | str
) -> None:
    parse = cli.number(kind, **limits)
    if not isinstance(found, str):
        assert parse(text) == found
        return
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        parse(text)
    assert str(refusal.value) == found


def test_no_tool_takes_a_number_without_a_range() -> None:
    plain = []
    for path in TOOLS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_type = isinstance(node, ast.keyword) and node.arg == "type"
            if is_type and isinstance(node.value, ast.Name) and node.value.id in ("int", "float"):
                plain.append(f"{path.name}:{node.value.lineno}")
    assert plain == []


@pytest.mark.parametrize("text", ["a/b", "../x", "..", "", "/tmp/x", "a.b", "a b"])
def test_a_prefix_of_file_names_leads_into_no_other_folder(text: str) -> None:
    assert cli.file_prefix("codes-train_2") == "codes-train_2"
    with pytest.raises(argparse.ArgumentTypeError, match="use letters, digits, _ and - only"):
        cli.file_prefix(text)
