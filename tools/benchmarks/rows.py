"""What a benchmark finds, a row for each case and form, and whether its code has changed since."""

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine
from taming_dist.checkout import changed_files, commit_of, git
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
    """Of which code, when and on which machine rows were found. `commit` is "" where there is no
    git repository; `changed`: the files that differed from it."""

    commit: str
    changed: Sequence[str]
    date: str
    machine: Machine


@dataclasses.dataclass(frozen=True)
class Row:
    """One form of a case: `ours`, `original` or another name, "" where there are no forms.

    `value` in `unit`, such as images/s; `ms` of one call, the median, and its quartiles `low_ms`
    and `high_ms`; `cpu_ms`: processor time of a call, of all threads; `memory_mb`: the peak above
    what was held before it was built; `gflop`: what its mathematics takes, counted, in whatever
    form; `peak`: the measured peak of the machine that it is held against, and `share` of that;
    `times`: how often it is as fast as the original in `against`. `notes`: more figures by name.
    `paths`: what of the repository it depends on.
    """

    benchmark: str
    case: str
    form: str
    value: float
    unit: str
    precision: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    cpu_ms: float | None = None
    memory_mb: float | None = None
    gflop: float | None = None
    peak: str | None = None
    share: float | None = None
    times: float | None = None
    against: str = ""
    notes: dict[str, float] = dataclasses.field(default_factory=dict)
    paths: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one run."""

    run: Run
    rows: Sequence[Row]


def rows_of(benchmark: str, figures: Mapping[str, float], paths: Sequence[str]) -> list[Row]:
    """A row for each figure; its unit is what follows the last comma of its name."""
    found = []
    for name, value in figures.items():
        case, comma, unit = name.rpartition(", ")
        row = Row(benchmark, case, "", value, unit, paths=paths)
        found.append(row if comma else dataclasses.replace(row, case=name, unit=""))
    return found


def this_run(machine: Machine) -> Run:
    """The run that begins now: what it measures is the code that there is now."""
    commit = commit_of(REPOSITORY) or ""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Run(commit, changed_files(REPOSITORY), today, machine)


def save(path: Path, found: Iterable[Rows]) -> None:
    """Write runs and their rows as JSON."""
    write_json(path, [dataclasses.asdict(each) for each in found])


def load(path: Path) -> list[Rows]:
    """Read what `save` wrote.

    Raises:
        UserError: it is not that.
    """
    given = read_json(path)
    try:
        return [_rows(each) for each in given]
    except (TypeError, KeyError, AttributeError) as error:
        advice = "give what tools/benchmark.py wrote with --out"
        raise UserError(f"{path} holds no rows of a benchmark ({error}): {advice}") from error


def _rows(given: Mapping[str, Any]) -> Rows:
    run = dict(given["run"])
    run["machine"] = Machine(**run["machine"])
    return Rows(Run(**run), [Row(**row) for row in given["rows"]])


def age(row: Row, run: Run, repository: Path = REPOSITORY) -> str:
    """Why a row may not be what its code does now, or "".

    Its paths are compared with the working tree, so that changes that are not committed count, and
    a change that was taken back does not.
    """
    if not run.commit:
        return "of unknown code"
    if any(Path(file).is_relative_to(path) for file in run.changed for path in row.paths):
        return "of changes that were not committed"
    if git(repository, "cat-file", "-t", run.commit) != "commit":
        return "of a commit that is not here"
    if git(repository, "diff", "--name-only", run.commit, "--", *row.paths):
        return "older than its code"
    return ""
