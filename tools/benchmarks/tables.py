"""`tools/benchmark.py table`: Markdown of what benchmarks wrote with --out.

A row whose code has changed since it was measured is marked. Rows are shown on a terminal the same
way, without marks.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import COPY
from benchmarks.rows import REPOSITORY, Row, Rows, Run, age, load
from taming_dist.errors import UserError

BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: row.case,
    "form": lambda row: f"{row.form}, {row.precision}" if row.precision else row.form,
    "rate": lambda row: f"{short(row.value)} {row.unit}".strip(),
    "ms (quartiles)": lambda row: (
        short(row.ms)
        if row.ms is None or row.low_ms is None
        else f"{short(row.ms)} ({short(row.low_ms)} to {short(row.high_ms)})"
    ),
    "CPU ms": lambda row: short(row.cpu_ms),
    "times the original": lambda row: short(row.times),
    "MB": lambda row: short(row.memory_mb),
    "GFLOP": lambda row: short(row.gflop),
    "of the peak": lambda row: "" if row.share is None else f"{row.share:.0%} ({row.peak})",
    "beside": lambda row: ", ".join(f"{name} {short(row.notes[name])}" for name in row.notes),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="JSON files of benchmarks")
    parser.add_argument("--into", type=Path, help=f"a document that has a place for it: {BEGIN}")


def run(arguments: argparse.Namespace) -> None:
    """Print the tables, or put them into a document."""
    text = markdown([rows for file in arguments.files for rows in load(file)])
    if arguments.into is None:
        print(text)
    else:
        write_into(arguments.into, text)


def short(value: float | None) -> str:
    """Four digits, or whole if there are more."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def heading(run: Run) -> str:
    """Where and when rows were found."""
    machine, peaks = run.machine, run.machine.peaks
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    code = f"commit {run.commit or 'unknown'}"
    host = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:g} GB"
    where = host if machine.device == "CPU" else f"{machine.device} ({host})"
    found = [f"{name} {short(value)}" for name, value in peaks.items() if name != COPY]
    measured = f"; measured peaks: {', '.join(found)} GFLOP/s" if found else ""
    measured += f", copy {short(peaks[COPY])} GB/s" if COPY in peaks else ""
    return f"{run.date}, {code}, {where}, {machine.threads} threads; {versions}{measured}."


def used(rows: Sequence[Row]) -> list[str]:
    """The columns that have something in them."""
    return [name for name, text in COLUMNS.items() if any(text(row) for row in rows)]


def lines(rows: Sequence[Row]) -> list[str]:
    """A table for a terminal."""
    names = used(rows)
    cells = [names, *([COLUMNS[name](row) for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def markdown(found: Sequence[Rows], repository: Path = REPOSITORY) -> str:
    """A table for each run, a row that may not be what its code does now marked."""
    parts = []
    for each in found:
        ages = [age(row, each.run, repository) for row in each.rows]
        names = used(each.rows)
        table = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for row, old in zip(each.rows, ages, strict=True):
            cells = [COLUMNS[name](row) for name in names]
            cells[0] += f" **[{old}]**" if old else ""
            table.append(f"| {' | '.join(cells)} |")
        title = ", ".join(dict.fromkeys(row.benchmark for row in each.rows))
        parts.append("\n".join([f"`{title}`: {heading(each.run)}", "", *table]))
    return "\n\n".join(parts)


def write_into(document: Path, text: str) -> None:
    """Put a text between the marks that a document has for it.

    Raises:
        UserError: it has no marks.
    """
    try:
        before, begin, rest = document.read_text().partition(BEGIN)
    except OSError as error:
        raise UserError(f"{document}: cannot be read ({error.strerror})") from error
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{document}: put {BEGIN} and {END} where the tables belong")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
