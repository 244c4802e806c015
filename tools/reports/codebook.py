"""How evenly a first stage uses its codebook: codes by rank, from the counts of validations."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import torch

from reports.charts import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, ends_of, pen
from reports.html import cells, colour, plain, table
from reports.quantities import Line
from reports.reading import CodeUses, RunRecord
from taming_dist.evaluation.reconstruction import codebook_use

LEFT = 50.0
POINTS = 128  # of a line, evenly spread over the codes that were used
LAST, FIRST = "last", "first"


def use_part(runs: Sequence[RunRecord], several: bool) -> str:
    """The part of the runs that have counts; empty if none has. `several` runs are on the page."""
    known = [run for run in runs if run.uses]
    if not known:
        return ""
    lines = [line_of(run, run.uses[-1], LAST) for run in known]
    lines += [line_of(run, run.uses[0], FIRST) for run in known if len(run.uses) > 1]
    dashes = (
        "<span class=keys>"
        + "".join(
            f"<span><svg class=key viewBox='0 0 24 6' aria-hidden=true>"
            f"<path class='line s{dash}' d='M0,3H24'/></svg>{name} validation</span>"
            for dash, name in enumerate((LAST, FIRST))
        )
        + "</span>"
    )
    caption = f"<span>Share of the uses of a code, %</span>{dashes if lines[len(known) :] else ''}"
    figure = f"<figure class=codes><figcaption>{caption}</figcaption>{svg(lines, several)}</figure>"
    return figure + use_table(known)


def line_of(run: RunRecord, uses: CodeUses, label: str) -> Line:
    """The codes that were used, the most used first: percent of uses by percent of codes.
    A line ends where the codes begin that were never used: a logarithm has no place for them."""
    counts = uses.counts[uses.counts > 0]
    places = np.unique(
        np.linspace(0, counts.size - 1, min(POINTS, counts.size)).round().astype(int)
    )
    rank = 100 * (places + 1) / uses.counts.size
    return Line(run, label, {"rank": rank.tolist()}, (100 * counts[places] / counts.sum()).tolist())


def svg(lines: Sequence[Line], several: bool) -> str:
    """The drawing, whole without a script."""
    values = [value for line in lines for value in line.y if value is not None]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    wide, base = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM

    def down(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * (base - TOP)

    parts = [
        f"<path class=grid d='M{LEFT:g},{down(10.0**power):.1f}H{WIDTH - RIGHT:g}'/><text "
        f"x={LEFT - 6:g} y={down(10.0**power) + 3.5:.1f} text-anchor=end>{10.0**power:g}</text>"
        for power in range(low, high + 1)
    ]
    parts += [
        f"<text x={LEFT + share / 100 * wide:.1f} y={base + 14:g} text-anchor=middle>{share}</text>"
        for share in (0, 25, 50, 75, 100)
    ]
    parts.append(
        f"<text x={LEFT + wide / 2:g} y={base + 30:g} text-anchor=middle>"
        f"rank of the code, % of the codebook</text>"
    )
    for line in lines:
        points = [
            (LEFT + along / 100 * wide, down(value))
            for along, value in zip(line.x["rank"], line.y, strict=True)
            if value is not None
        ]
        path = pen(points) + ("h0.1" if len(points) == 1 else "")
        dash = int(line.label == FIRST)
        parts.append(
            f"<g class={colour(line.run)} data-run={line.run.number}>"
            f"<path class='line s{dash}' d='{path}'/></g>"
        )
    if several:
        parts.append(ends_of([line for line in lines if line.label == LAST], down))
    said = ", ".join(
        f"{line.run.name} {line.x['rank'][-1]:.3g} %" for line in lines if line.label == LAST
    )
    spoken = escape(f"Use of the codebook by rank; codes used at the last validation: {said}")
    return (
        f"<svg role=img viewBox='0 0 {WIDTH:g} {HEIGHT:g}' aria-label='{spoken}'>"
        f"{''.join(parts)}</svg>"
    )


def use_table(runs: Sequence[RunRecord]) -> str:
    """The last validations in numbers."""
    last = [(run, run.uses[-1]) for run in runs]
    found = [(run, codebook_use(torch.tensor(uses.counts.copy()))) for run, uses in last]
    rows = [
        cells("After images", [(run, f"{uses.images:,.0f}") for run, uses in last]),
        cells("Codes", [(run, f"{uses.counts.size:,}") for run, uses in last]),
        cells("Never used", [(run, f"{1 - use['codebook_usage']:.1%}") for run, use in found]),
        cells("Uses of the most used 1 %", [(run, f"{uses.top:.1%}") for run, uses in last]),
        cells("Perplexity", [(run, plain(use["codebook_perplexity"])) for run, use in found]),
    ]
    return table("Use of the codebook at the last validation", runs, rows)
