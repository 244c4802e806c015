"""Charts as SVG that stands without a script, and the numbers with which page.js redraws it.

The y axis stays as it is drawn here; a reader switches the x axis and smooths, which page.js does
from `numbers`. Runs have a colour and a number, series of a run a dash, so that no one has to tell
them apart by colour alone.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from reports.html import colour, plain
from reports.quantities import Chart, Line
from reports.reading import RunRecord

WIDTH, HEIGHT = 380.0, 216.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 18.0, 8.0, 36.0
FEW = 12  # points of a line that are shown as dots
LABEL_GAP = 11.0  # between the numbers of runs at the right
AXES = {"steps": "optimizer steps", "images": "images seen", "hours": "hours of running"}
AT_FIRST = "images"


def figures(charts: Sequence[Chart], several: bool) -> str:
    """The charts of runs, `several` of which are on the page."""
    return f"<div class=charts>{''.join(figure(chart, several) for chart in charts)}</div>"


def figure(chart: Chart, several: bool) -> str:
    """One chart under its title."""
    caption = f"<span>{escape(chart.quantity.title)}</span>{keys(chart)}"
    data = escape(json_text(numbers(chart)))
    return (
        f"<figure class=chart data-chart='{data}'><figcaption>{caption}</figcaption>"
        f"{svg(chart, several)}<p class=readout aria-live=polite hidden></p></figure>"
    )


def json_text(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def numbers(chart: Chart) -> dict[str, Any]:
    """What page.js redraws a chart from: the ends of its axes, and its lines."""
    low, high = span(chart)
    return {
        "ends": {name: rounded(end) for name, end in chart.ends.items()},
        "low": low,
        "high": high,
        "lines": [
            {
                "run": line.run.number,
                "label": line.label,
                "x": {
                    name: [rounded(value, 6) for value in along] for name, along in line.x.items()
                },
                "y": [None if value is None else rounded(value) for value in line.y],
            }
            for line in chart.lines
        ],
    }


def rounded(value: float, digits: int = 5) -> float:
    """To so many significant digits."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def labels_of(chart: Chart) -> list[str]:
    """The labels of the series that are there, in their order."""
    there = {line.label for line in chart.lines}
    return [label for label in dict.fromkeys(chart.quantity.series.values()) if label in there]


def keys(chart: Chart) -> str:
    """What the dashes mean, where there is more than one series."""
    labels = labels_of(chart)
    found = [(f"s{place % 2}", label) for place, label in enumerate(labels)]
    found = found if len(found) > 1 else []
    if chart.floor is not None:
        found.append(("floor", chart.quantity.floor_label))
    samples = "".join(
        f"<span><svg class=key viewBox='0 0 24 6' aria-hidden=true>"
        f"<path class='line {dash}' d='M0,3H24'/></svg>{escape(label)}</span>"
        for dash, label in found
    )
    return f"<span class=keys>{samples}</span>" if samples else ""


def span(chart: Chart) -> tuple[float, float]:
    """The lowest and the highest value that a chart has room for."""
    values = [value for line in chart.lines for value in line.y if value is not None]
    values += [value for _, _, value in chart.marks]
    values += [] if chart.floor is None else [chart.floor]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room if low - room > 0 or low < 0 else 0.0, high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range, at most so many and one more."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number at a tick: 0.25, 1,500, 20k, 1.2M."""
    value = float(f"{value:.6g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.4g}{unit}"
    return plain(value) if abs(value) < 1000 else f"{value:,.0f}"


def svg(chart: Chart, several: bool) -> str:
    """The drawing. Its parts that depend on the x axis are in groups with `data-axis`."""
    low, high = span(chart)
    axis = AT_FIRST if AT_FIRST in chart.ends else next(iter(chart.ends))

    def down(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def right(value: float, name: str) -> float:
        return LEFT + value / chart.ends[name] * (WIDTH - LEFT - RIGHT)

    parts = [y_axis(low, high, down)]
    parts += [x_axis(name, end, name == axis) for name, end in chart.ends.items()]
    if chart.floor is not None:
        y = down(chart.floor)
        parts.append(f"<path class='line floor' d='M{LEFT:g},{y:.1f}H{WIDTH - RIGHT:g}'/>")
    order = labels_of(chart)
    for line in chart.lines:
        points = [
            None if value is None else (right(along, axis), down(value))
            for along, value in zip(line.x[axis], line.y, strict=True)
        ]
        parts.append(drawn(line, points, order.index(line.label) % 2))
    parts += [mark(run, at, value, right, down) for run, at, value in chart.marks]
    if several:
        parts.append(ends_of(chart.lines, down))
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    return (
        f"<svg role=img viewBox='{box}' tabindex=0 aria-label='{escape(spoken(chart))}'>"
        f"{''.join(parts)}<path class=cross d=''/></svg>"
    )


def y_axis(low: float, high: float, down: Any) -> str:
    """Lines across with their values at the left."""
    return "".join(
        f"<path class=grid d='M{LEFT:g},{down(value):.1f}H{WIDTH - RIGHT:g}'/>"
        f"<text x={LEFT - 6:g} y={down(value) + 3.5:.1f} text-anchor=end>{short(value)}</text>"
        for value in ticks(low, high, 4)
    )


def x_axis(name: str, end: float, is_shown: bool) -> str:
    """The values of one x axis, and what they are."""
    wide, base = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM
    found = "".join(
        f"<text x={LEFT + value / end * wide:.1f} y={base + 14:g} text-anchor=middle>"
        f"{short(value)}</text>"
        for value in ticks(0, end, 4)
    )
    title = escape(AXES.get(name, name))
    middle = LEFT + wide / 2
    found += f"<text x={middle:g} y={base + 30:g} text-anchor=middle>{title}</text>"
    hidden = "" if is_shown else " style='display:none'"
    return f"<g data-axis='{escape(name)}'{hidden}>{found}</g>"


def drawn(line: Line, points: Sequence[tuple[float, float] | None], dash: int) -> str:
    """A line, faint beneath what page.js smooths, and dots where it has few points."""
    path = pen(points)
    dots = "".join(f"M{point[0]:.1f},{point[1]:.1f}h0" for point in points if point)
    dots = dots if len(points) <= FEW else ""
    return (
        f"<g class={colour(line.run)} data-run={line.run.number}><path class=raw d=''/>"
        f"<path class='line s{dash}' d='{path}'/><path class=dots d='{dots}'/></g>"
    )


def pen(points: Iterable[tuple[float, float] | None]) -> str:
    """The path through points; None lifts the pen."""
    found, down = [], False
    for point in points:
        if point is not None:
            found.append(f"{'L' if down else 'M'}{point[0]:.1f},{point[1]:.1f}")
        down = point is not None
    return "".join(found)


def mark(
    run: RunRecord, at: Mapping[str, Sequence[float]], value: float, right: Any, down: Any
) -> str:
    """A ring where a run was at its best, on each axis."""
    rings = "".join(
        f"<g data-axis={name}{'' if name == AT_FIRST else ' style=display:none'}>"
        f"<circle cx={right(along, name):.1f} cy={down(value):.1f} r=5 /></g>"
        for name, (along,) in at.items()
    )
    title = escape(f"best of {run.name}: {value:.4g}")
    classes = f"'best {colour(run)}'"
    return f"<g class={classes} data-run={run.number}>{rings}<title>{title}</title></g>"


def ends_of(lines: Sequence[Line], down: Any) -> str:
    """The numbers of the runs at the right, each where its first line ends, none over another."""
    first = {line.run.number: line for line in reversed(lines)}
    found = []
    for line in first.values():
        values = [value for value in line.y if value is not None]
        if values:
            found.append((down(values[-1]), line))
    found.sort(key=lambda each: each[0])
    places = spread([y for y, _ in found], TOP + 4, HEIGHT - BOTTOM)
    return "".join(
        f"<text class='end {colour(line.run)}' data-run={line.run.number} x={WIDTH - RIGHT + 5:g} "
        f"y={y + 3.5:.1f}>{line.run.number}</text>"
        for y, (_, line) in zip(places, found, strict=True)
    )


def spread(places: Sequence[float], low: float, high: float) -> list[float]:
    """Ascending places moved apart to LABEL_GAP, within a range where there is room."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + LABEL_GAP if found else low))
    limit = high
    for at in range(len(found) - 1, -1, -1):
        found[at] = min(found[at], limit)
        limit = found[at] - LABEL_GAP
    return found


def spoken(chart: Chart) -> str:
    """A chart in words: where each line ends."""
    said = []
    for line in chart.lines:
        values = [value for value in line.y if value is not None]
        if values:
            label = f" {line.label}" if len(labels_of(chart)) > 1 else ""
            said.append(f"{line.run.name}{label} {values[-1]:.4g}")
    return f"{chart.quantity.title}; at the end: {', '.join(said)}"
