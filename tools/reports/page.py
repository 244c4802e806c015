"""The page from its parts: one file, with style and script in it, that asks for nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from reports.charts import figures
from reports.codebook import use_part
from reports.configs import config_tables
from reports.course import best, course_table
from reports.html import HERE, document, part, section, tag
from reports.pictures import (
    PREVIEW_BYTES,
    chosen,
    fitted,
    previews,
    reconstructions,
    sample_rows,
)
from reports.quantities import charts_of, kind_of
from reports.reading import RunRecord, read_runs
from reports.summary import comparison, figure_table, headline, named, time_bars
from taming_dist.atomic import write_bytes
from taming_dist.formats.files import writing


def write_page(
    out: Path,
    title: str,
    runs: Sequence[Path],
    summary: Mapping[str, Any] | None = None,
    evaluations: Sequence[Path] = (),
    samples: Path | None = None,
) -> None:
    """Write the page that compares `runs` (run directories), whole or not at all.

    `summary` holds metrics by name (see `summary.FIGURES`), `seconds` (phase -> seconds) and
    `classes` (names in the order of the class ids); missing parts are left out. `evaluations` and
    `samples` are out folders of taming_dist.evaluate and taming_dist.sample.

    Raises:
        UserError: a folder that is no run, or evaluations that do not compare.
    """
    known = summary or {}
    compared = comparison(evaluations, known.get("classes", []))  # refuses before anything is drawn
    records = read_runs(runs)
    parts = [
        headline(known),
        *(
            section(f"Validation images and their reconstructions{of}", reconstructions(folder))
            for folder, of in zip(evaluations, named(evaluations), strict=True)
        ),
        section("Samples", sample_rows(samples, known.get("classes", []))),
        toolbar(records),
        *trainings(records, known),
        section("Figures", figure_table(known)),
        section("Evaluations", compared),
        section("Where the time went", time_bars(known.get("seconds", {}))),
    ]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    text = document(title, "\n".join(filter(None, parts)), script)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, text.encode("utf-8", "backslashreplace"))


def trainings(records: Sequence[RunRecord], summary: Mapping[str, Any]) -> list[str]:
    """A section for each kind of run: what two kinds log and are set up with does not compare."""
    uris = fitted([each.file for run in records for each in chosen(run)], PREVIEW_BYTES)
    kinds: dict[str, list[RunRecord]] = {}
    for run in records:
        kinds.setdefault(kind_of(run), []).append(run)
    several = len(records) > 1
    found = []
    for kind, runs in kinds.items():
        bests = [(run, event) for run in runs if (event := best(run)) is not None]
        charts = charts_of(runs, summary, bests)
        found.append(
            section(
                f"Training, {kind}",
                "\n".join(
                    [
                        faults(runs),
                        part("Curves", figures(charts, several) if charts else ""),
                        part("Previews", previews(runs, uris)),
                        part("Use of the codebook", use_part(runs, several)),
                        part("Course and cost", course_table(runs)),
                        part("Configuration", config_tables(runs)),
                    ]
                ),
            )
        )
    return found


def faults(runs: Sequence[RunRecord]) -> str:
    """What could not be read, a line for each run."""
    return "".join(
        f"<p class=fault data-run={run.number}>{tag(run)}: {escape('; '.join(run.faults))}.</p>"
        for run in runs
        if run.faults
    )


def toolbar(records: Sequence[RunRecord]) -> str:
    """The runs with their colours, and what page.js offers: which runs are shown, the x axis,
    smoothing. Without it only the names are there."""
    runs = "".join(
        f"<li><label><input type=checkbox checked hidden data-toggle={run.number}>{tag(run)}"
        f"</label></li>"
        for run in records
    )
    axes = "".join(
        f"<label><input type=radio name=axis value={name}{' checked' if name == 'images' else ''}>"
        f"{name}</label>"
        for name in ("steps", "images", "hours")
    )
    return (
        f"<div class=toolbar><ul class=legend aria-label=Runs>{runs}</ul>"
        f"<fieldset class=axes hidden><legend>x axis</legend>{axes}</fieldset>"
        f"<label class=smoothing hidden>Smoothing <input type=range min=0 max=20 value=0 step=1 "
        f"aria-valuetext=none><output>none</output></label></div>"
    )
