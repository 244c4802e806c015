"""Pieces of HTML that several parts of the page share; what comes from files is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from reports.reading import RunRecord

HERE = Path(__file__).parent
COLOURS = 6  # of runs, in page.css; a seventh has the first again, and its own number


def document(title: str, body: str, script: str = "") -> str:
    """A page of its own, with the style of all pages in it, that may ask for nothing outside it."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return PAGE.format(title=escape(title), style=style, body=body, script=script)


def section(heading: str, content: str) -> str:
    """One part of the page; empty without content."""
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>" if content else ""


def part(heading: str, content: str) -> str:
    """A part of a section; empty without content."""
    return f"<h3>{escape(heading)}</h3>\n{content}" if content else ""


def colour(run: RunRecord) -> str:
    """The CSS class of a run's colour."""
    return f"c{(run.number - 1) % COLOURS}"


def tag(run: RunRecord) -> str:
    """The number and name of a run, in its colour."""
    return f"<span class='tag {colour(run)}'><b>{run.number}</b> {escape(run.name)}</span>"


def table(label: str, runs: Sequence[RunRecord], rows: Sequence[str], corner: str = "") -> str:
    """Rows (see `cells`) under the runs' names; wide ones scroll within their own box."""
    heads = "".join(f"<th scope=col data-run={run.number}>{tag(run)}</th>" for run in runs)
    head = f"<thead><tr><th scope=col>{escape(corner)}</th>{heads}</tr></thead>"
    return scrolling(label, f"<table>{head}<tbody>{''.join(rows)}</tbody></table>")


def scrolling(label: str, content: str) -> str:
    """Content in a box that scrolls sideways where it is too wide, also by the keyboard."""
    return f"<div class=scroll role=region tabindex=0 aria-label='{escape(label)}'>{content}</div>"


def cells(label: str, values: Iterable[tuple[RunRecord, str]], others: Iterable[int] = ()) -> str:
    """A row of a table; `others`: the numbers of runs that have it otherwise than the first."""
    marked = set(others)
    sign = "<span class=sign title='differs'>&ne;</span> " if marked else ""
    found = "".join(
        f"<td data-run={run.number}{' class=other' if run.number in marked else ''}>"
        f"{escape(text)}</td>"
        for run, text in values
    )
    head = f"<th scope=row>{sign}{escape(label)}</th>"
    return f"<tr{' class=differs' if marked else ''}>{head}{found}</tr>"


def plain(value: float) -> str:
    """A number of about three digits, without an exponent where it has a usual size."""
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{float(text):f}".rstrip("0").rstrip(".") if "e" in text else text


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
