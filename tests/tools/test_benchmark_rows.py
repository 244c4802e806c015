"""Rows of benchmarks: written, read, shown, and marked where their code has changed since."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.engine.settings import EngineConfig
from taming_dist.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from benchmark import BENCHMARKS, main  # noqa: E402
from benchmarks import cases, suite  # noqa: E402
from benchmarks.cases import Case, Form  # noqa: E402
from benchmarks.machine import Machine  # noqa: E402
from benchmarks.rows import REPOSITORY, Row, Rows, Run, age, load, rows_of, save  # noqa: E402
from benchmarks.tables import BEGIN, END, markdown  # noqa: E402

MACHINE = Machine("CPU", "a processor", 2, 1, 8.0, {"torch": "2.13"}, {"gemm fp32": 100.0})


class Repository:
    """A repository of two files, and the run that a measurement of its first commit was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q")
        self.write("measured.py", "1")
        self.write("other.py", "1")
        self.commit = self.save()
        self.run = Run(self.commit, [], "2026-11-27", MACHINE)

    def git(self, *words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def save(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "a commit")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "repository").mkdir()
    return Repository(tmp_path / "repository")


def row(**changed: Any) -> Row:
    return Row("stage1", "a step", "ours", 12.5, "images/s", paths=("measured.py",), **changed)


def test_a_row_is_as_old_as_the_code_that_it_measures(repository: Repository) -> None:
    def found() -> str:
        return age(row(), repository.run, repository.folder)

    assert found() == ""
    repository.write("other.py", "2")
    repository.save()
    assert found() == ""
    repository.write("measured.py", "2")
    assert found() == "older than its code"
    repository.save()
    assert found() == "older than its code"
    repository.write("measured.py", "1")
    repository.save()
    assert found() == ""


@pytest.mark.parametrize(
    ("commit", "changed", "why"),
    [
        ("", [], "of unknown code"),
        ("0123456789", [], "of a commit that is not here"),
        ("first", ["measured.py"], "of changes that were not committed"),
        ("first", ["measured.py.orig", "other.py"], ""),
    ],
)
def test_a_row_of_code_that_cannot_be_compared_says_so(
    repository: Repository, commit: str, changed: list[str], why: str
) -> None:
    commit = repository.commit if commit == "first" else commit
    run = Run(commit, changed, "2026-11-27", MACHINE)
    assert age(row(), run, repository.folder) == why


def test_old_rows_are_marked_in_the_table(repository: Repository) -> None:
    rows = [row(ms=80.0, low_ms=79.0, high_ms=82.0, times=2.0), row(precision="bf16", share=0.5)]
    found = Rows(repository.run, rows)
    fresh = markdown([found], repository.folder)
    assert "| a step | ours | 12.5 images/s | 80 (79 to 82) | 2 |" in fresh
    assert "gemm fp32 100 GFLOP/s" in fresh
    assert "older" not in fresh
    repository.write("measured.py", "2")
    assert markdown([found], repository.folder).count("**[older than its code]**") == 2


def test_rows_are_read_as_they_were_written(tmp_path: Path, repository: Repository) -> None:
    found = Rows(repository.run, [row(notes={"codes, %": 99.5})])
    save(tmp_path / "rows.json", [found])
    (again,) = load(tmp_path / "rows.json")
    assert again.run == found.run
    assert markdown([again], repository.folder) == markdown([found], repository.folder)


@pytest.mark.parametrize("text", ["[{}]", '{"a": 1}', '[{"run": {}, "rows": []}]', "1"])
def test_a_file_that_holds_no_rows_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json holds no rows of a benchmark"):
        load(file)


def test_a_table_takes_its_place_in_a_document(
    tmp_path: Path, repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, document = tmp_path / "rows.json", tmp_path / "page.md"
    save(rows, [Rows(repository.run, [row()])])
    document.write_text(f"# Speed\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    for _ in range(2):
        main(["table", str(rows), "--into", str(document)])
        text = document.read_text()
        assert text.startswith(f"# Speed\n\n{BEGIN}\n\n`stage1`: 2026-11-27")
        assert text.endswith(f"|\n\n{END}\n\nThe end.\n")
        assert "old\n" not in text
    document.write_text("# Speed\n")
    with pytest.raises(UserError, match=r"page\.md: put .* where the tables belong"):
        main(["table", str(rows), "--into", str(document)])


def test_figures_by_name_become_rows_with_their_units() -> None:
    first, second = rows_of("codes", {"shuffled, M tokens/s": 5.0, "a ratio": 0.5}, ["paths"])
    assert (first.case, first.unit, first.value) == ("shuffled", "M tokens/s", 5.0)
    assert (second.case, second.unit) == ("a ratio", "")


def test_forms_take_turns_and_are_held_against_the_original_and_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a clock that the work itself moves, so that every figure is known."""
    clock, order = [0.0], []

    def form(name: str, seconds: float) -> Form:
        def call() -> str:
            order.append(name)
            clock[0] += seconds
            return name

        return Form(name, "fp32", lambda: call, lambda answer: {answer: 1.0})

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])
    device = torch.device("cpu")
    case = Case("work", "images/s", 8, 4e9, "gemm", (), [form("original", 2.0), form("ours", 0.5)])
    original, ours = cases.measure("stage1", case, 3, device)
    assert order[-6:] == ["original", "ours", "ours", "original", "original", "ours"]
    assert (ours.value, ours.ms, ours.times, ours.notes) == (16.0, 500.0, 4.0, {"ours": 1.0})
    assert (original.times, ours.against) == (1.0, "fp32")
    assert cases.share(ours, {"gemm fp32": 16.0}) == 0.5


@pytest.mark.parametrize("name", suite.SHORT)
def test_the_short_form_of_every_benchmark_is_one_that_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(BENCHMARKS[name], "run", taken.append)
    main([name, *suite.SHORT[name]])
    assert len(taken) == 1


@pytest.mark.parametrize("name", suite.SHORT)
def test_the_code_that_rows_depend_on_is_there(name: str) -> None:
    module = BENCHMARKS[name]
    paths = [path for kind in ("PATHS", "STEP", "STAGE") for path in getattr(module, kind, ())]
    assert paths
    assert [
        path for path in (*paths, *cases.BASELINE_PATHS) if not (REPOSITORY / path).exists()
    ] == []


def test_settings_of_the_engine_are_those_of_the_configuration() -> None:
    def engine(*words: str, precision: str = "bf16") -> EngineConfig:
        return cases.engine_of(argparse.Namespace(engine=list(words)), precision)

    assert engine("zero=2", "reduce=bf16") == EngineConfig(2, "bf16", "none", "bf16")
    assert engine(precision="tf32") == EngineConfig(precision="fp32", tf32="all")
    with pytest.raises(UserError, match="--engine zeor=2: Key 'zeor' not in 'EngineConfig'"):
        engine("zeor=2")
    with pytest.raises(UserError, match=r"engine\.zero=5"):
        engine("zero=5")


def test_the_page_of_speed_shows_the_rows_that_are_kept() -> None:
    """But for the marks, which depend on the day."""
    docs = REPOSITORY / "docs"
    page = (docs / "speed.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()
    shown, rows = (re.sub(r" \*\*\[.*?]\*\*", "", text)
                   for text in (page, markdown(load(docs / "speed.json"))))  # fmt: skip
    assert shown == rows, "run tools/benchmark.py table docs/speed.json --into docs/speed.md"
