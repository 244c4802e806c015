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
