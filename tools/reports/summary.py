"""What the page shows of a whole chain beside its runs: figures, evaluations, time per phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from reports.html import scrolling
from taming_dist.cli import duration
from taming_dist.evaluation.comparison import by_class, side_by_side


@dataclass(frozen=True)
class FigureOf:
    """How one metric of the summary is shown; `floor` names the metric that it has to beat."""

    key: str
    label: str
    form: str
    floor: str = ""
    floor_label: str = ""
    headline: str = ""


FIGURES = (
    FigureOf("val_psnr", "Reconstruction, PSNR", "{:.2f} dB", "val_psnr_mean_colour",
             "mean colour", "PSNR"),
    FigureOf("val_lpips", "Reconstruction, LPIPS (lower is better)", "{:.3f}",
             "val_lpips_mean_colour", "mean colour", "LPIPS"),
    FigureOf("lpips_before_gan", "LPIPS before the GAN starts", "{:.3f}"),
    FigureOf("lpips_after_gan", "LPIPS after the GAN has started", "{:.3f}"),
    FigureOf("codebook_usage", "Codes in use", "{:.1%}", headline="codes in use"),
    FigureOf("codebook_perplexity", "Codebook perplexity", "{:.0f} codes"),
    FigureOf("val_nll", "Transformer, loss (lower is better)", "{:.3f} nats/token",
             "unigram_entropy", "code frequencies", "transformer"),
    FigureOf("peak_memory_gb", "Peak memory", "{:.2f} GB"),
)  # fmt: skip
NOT_FIGURES = ("seconds", "classes")


def headline(summary: Mapping[str, Any]) -> str:
    """The few metrics that a reader looks for first, each with its baseline."""
    cards = []
    for figure in FIGURES:
        if not figure.headline or figure.key not in summary:
            continue
        floor = ""
        if figure.floor in summary:
            value = figure.form.format(summary[figure.floor]).partition(" ")[0]
            floor = f"<small>{escape(figure.floor_label)}: {value}</small>"
        value = figure.form.format(summary[figure.key])
        amount, _, unit = value.partition(" ")
        value = f"{amount} <small>{unit}</small>"
        name = escape(figure.headline)
        cards.append(f"<div class=card><span>{name}</span><b>{value}</b>{floor}</div>")
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""


def figure_table(summary: Mapping[str, Any]) -> str:
    """All metrics: first those that this page knows, then whatever else the summary holds."""
    rows, shown = [], set(NOT_FIGURES)
    for figure in FIGURES:
        if figure.key not in summary:
            continue
        shown |= {figure.key, figure.floor}
        value = f"<b>{figure.form.format(summary[figure.key])}</b>"
        if figure.floor in summary:
            floor = figure.form.format(summary[figure.floor])
            value += f" <small>{escape(figure.floor_label)}: {floor}</small>"
        rows.append((figure.label, value))
    for key, value in summary.items():
        if key not in shown and isinstance(value, int | float | str):
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            rows.append((key.replace("_", " "), f"<b>{escape(text)}</b>"))
    body = "".join(
        f"<tr><th scope=row>{escape(label)}</th><td>{value}</td></tr>" for label, value in rows
    )
    return scrolling("Figures", f"<table>{body}</table>") if rows else ""


def comparison(evaluations: Sequence[Path], classes: Sequence[str] = ()) -> str:
    """A table of the figures of evaluations, each with the hash of its protocol, and one of those
    by class, folded away, whose `classes` may have names.

    Raises:
        UserError: figures of two protocols, or a folder without an evaluation.
    """
    if not evaluations:
        return ""
    heads = "".join(f"<th scope=col>{escape(str(folder))}</th>" for folder in evaluations)
    rows = [
        f"<tr><th scope=row>{escape(name)}</th>"
        f"{''.join(f'<td>{figure(value)}</td>' for value in values)}</tr>"
        for name, values in side_by_side(evaluations).items()
    ]
    note = "<p>In brackets: the hash of the protocol, which all of a row have in common.</p>"
    table = f"<table><tr><td></td>{heads}</tr>{''.join(rows)}</table>"
    return note + scrolling("Evaluations", table) + class_table(evaluations, classes)


def class_table(evaluations: Sequence[Path], classes: Sequence[str]) -> str:
    """The figures by class, those of several evaluations beside each other; empty without any."""
    found = by_class(evaluations)
    if not found:
        return ""
    several = len(evaluations) > 1
    titles = [escape(name.replace("_by_class", "")) for name in found]
    places = [f"<br><small>{escape(str(folder))}</small>" * several for folder in evaluations]
    heads = "".join(f"<th scope=col>{title}{place}</th>" for title in titles for place in places)
    columns = [values for every in found.values() for values in every]
    rows = []
    for number in range(max(map(len, columns))):
        name = classes[number] if number < len(classes) else str(number)
        cells = "".join(
            f"<td>{figure(values[number] if number < len(values) else None)}</td>"
            for values in columns
        )
        rows.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    table = (
        f"<table><thead><tr><th scope=col>Class</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return f"<details><summary>By class</summary>{scrolling('By class', table)}</details>"


def figure(value: Any) -> str:
    """A figure in a table; nothing where there is none."""
    if value is None:
        return ""
    return f"<b>{value:.6g}</b>" if isinstance(value, int | float) else escape(str(value))


def named(evaluations: Sequence[Path]) -> list[str]:
    """What tells the pictures of several evaluations apart, after their heading."""
    return [f": {folder}" if len(evaluations) > 1 else "" for folder in evaluations]


def time_bars(seconds: Mapping[str, float]) -> str:
    """One bar per phase, as long as its share of the total time."""
    total = sum(seconds.values())
    if not total:
        return ""
    longest = max(seconds.values())
    rows = [
        f"<div class=phase><span>{escape(phase.replace('_', ' '))}</span>"
        f"<i><b style='width:{100 * spent / longest:.1f}%'></b></i>"
        f"<span>{duration(spent)}</span><span>{spent / total:.0%}</span></div>"
        for phase, spent in seconds.items()
    ]
    return f"<p>{duration(total)} in all.</p><div class=phases>{''.join(rows)}</div>"
