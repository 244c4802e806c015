import runpy
import sys
from pathlib import Path

import pytest

from taming_dist import cli

TOOLS = Path(__file__).parents[1] / "tools"


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
    assert error.endswith("; --help lists all arguments\n")


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
            f"error: {type(error).__name__}: {text} "
            f"(the traceback is in {tmp_path / 'rank-0.log'})\n"
        )
