"""Make one self-contained page from runs: pictures, curves, metrics, time.

The page needs no network and no other file; it follows the reader's light or dark setting.

    python tools/report.py outputs/demo/vqgan outputs/demo/transformer --out report.html \
        [--summary summary.json] [--evaluation DIR ...] [--samples DIR]

Figures of several evaluations stand side by side, each with the hash of its protocol
(docs/evaluation.md); figures of different protocols are refused.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from taming_dist import cli
from taming_dist.cli import count
from taming_dist.errors import UserError
from taming_dist.evaluation.comparison import side_by_side

Records = list[dict[str, Any]]


def main() -> None:
    """Read the runs named on the command line and write the page."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run directories (run.dir)")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--summary", type=Path, help="summary.json of the demo")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], help="out folders of taming_dist.evaluate"
    )
    parser.add_argument("--samples", type=Path, help="out folder of taming_dist.sample")
    parser.add_argument("--title", default="taming_dist: a report")
    args = parser.parse_args()
    summary = _json(args.summary) if args.summary else {}
    runs = {f"Training: {run.name}": run for run in args.runs}
    write_page(args.out, args.title, summary, runs, args.evaluation, args.samples)
    print(f"wrote {args.out}")


def write_report(
    out: Path,
    summary: Mapping[str, Any],
    vqgan_run: Path,
    transformer_run: Path,
    evaluations: Sequence[Path],
    samples: Path | None,
    title: str = "taming_dist: from photographs to new images",
) -> None:
    """Write the page of a whole chain; see `write_page`."""
    runs = {
        "Training, stage 1: VQGAN": vqgan_run,
        "Training, stage 2: transformer": transformer_run,
    }
    write_page(out, title, summary, runs, evaluations, samples)


def write_page(
    out: Path,
    title: str,
    summary: Mapping[str, Any],
    runs: Mapping[str, Path],
    evaluations: Sequence[Path] = (),
    samples: Path | None = None,
) -> None:
    """Write the page for `runs` (heading -> run directory) atomically.

    `summary` holds metrics by name (see FIGURES), `seconds` (phase -> seconds) and `classes`
    (names in the order of the class ids); missing parts are left out. `evaluations` and `samples`
    are out folders of taming_dist.evaluate and taming_dist.sample.

    Raises:
        UserError: a run without metrics.jsonl, or evaluations that do not compare.
    """
    compared = comparison(evaluations)  # refuses before anything is drawn
    curves = [section(heading, training(run, summary)) for heading, run in runs.items()]
    parts = [
        headline(summary),
        *(
            section(f"Validation images and their reconstructions{of}", reconstructions(folder))
            for folder, of in zip(evaluations, named(evaluations), strict=True)
        ),
        section("Samples", sample_rows(samples, summary.get("classes", []))),
        *curves,
        section("Figures", figure_table(summary)),
        section("Evaluations side by side", compared),
        section("Where the time went", time_bars(summary.get("seconds", {}))),
    ]
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, parts)))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.tmp")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)


def section(heading: str, content: str) -> str:
    """One part of the page; empty without content."""
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>" if content else ""


# ---- metrics ----


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
        number, _, unit = value.partition(" ")
        value = f"{number} <small>{unit}</small>"
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
    body = "".join(f"<tr><th>{escape(label)}</th><td>{value}</td></tr>" for label, value in rows)
    return f"<table>{body}</table>" if rows else ""


def comparison(evaluations: Sequence[Path]) -> str:
    """A table of the figures of several evaluations; nothing for one alone."""
    if len(evaluations) < 2:
        return ""
    heads = "".join(f"<th>{escape(str(folder))}</th>" for folder in evaluations)
    rows = [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{shown(value)}</td>' for value in values)}</tr>"
        for name, values in side_by_side(evaluations).items()
    ]
    note = "<p>In brackets: the hash of the protocol, which all of a row have in common.</p>"
    table = f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f"{note}<div style='overflow-x:auto'>{table}</div>"


def shown(value: Any) -> str:
    """A figure in a table; nothing where there is none."""
    return "" if value is None else f"<b>{value:.6g}</b>"


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


def duration(seconds: float) -> str:
    """Seconds as readable text: 8.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ---- pictures ----


def reconstructions(evaluation: Path) -> str:
    """Pairs of an input above its reconstruction, from the evaluation's folder."""
    inputs = sorted((evaluation / "images").glob("*-input.png"))
    pairs = [
        f"<div class=pair>{picture(image, 'input')}"
        f"{picture(Path(str(image).replace('-input', '-reconstruction')), 'reconstruction')}</div>"
        for image in inputs
    ]
    note = "<p>Top: crops that were not used in training; bottom: their reconstructions.</p>"
    return f"{note}<div class=pairs>{''.join(pairs)}</div>" if pairs else ""


def sample_rows(samples: Path | None, names: Sequence[str]) -> str:
    """Samples in one row per class, under the class's name."""
    if samples is None:
        return ""
    listing = _json(samples / "samples.json")
    by_class: dict[int | None, list[Path]] = {}
    for image in listing["images"]:
        by_class.setdefault(image["class"], []).append(samples / image["file"])
    rows = []
    for class_id in sorted(by_class, key=lambda known: -1 if known is None else known):
        label = "samples" if class_id is None else f"class {class_id}"
        if class_id is not None and class_id < len(names):
            label = names[class_id].replace("_", " ")
        images = "".join(picture(file, f"sample of {label}") for file in by_class[class_id])
        rows.append(f"<div class=row><h3>{escape(label)}</h3><div class=strip>{images}</div></div>")
    return f"<div class=rows>{''.join(rows)}</div>"


def picture(file: Path, description: str) -> str:
    """An image embedded in the page, as wide as its place there."""
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: write its folder again, or omit it") from error
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


# ---- runs ----


def training(run: Path, summary: Mapping[str, Any]) -> str:
    """The curves of a run, what it was like at its best and why it ended, and its last preview."""
    told = lines_of(run / "events.jsonl") if (run / "events.jsonl").is_file() else []
    best = next((event for event in reversed(told) if event["event"] == "best"), None)
    parts = [remarks(best, told), charts(records(run), summary, best), last_preview(run)]
    return "\n".join(filter(None, parts))


def remarks(best: Mapping[str, Any] | None, told: Records) -> str:
    """The best validation in words, why the run ended if that is unusual, and its course."""
    said = []
    if best is not None:
        said.append(f"Best {best['metric']}: {best['value']:.4g}, after {best['samples']} images.")
    ends = [event for event in told if event["event"] == "exit"]
    if ends and ends[-1].get("reason") != "finished":
        said.append(f"It ended with: {ends[-1].get('reason', 'no reason given')}.")
    said += [course(told)] if ends else []
    return f"<p>{escape(' '.join(said))}</p>" if said else ""


def course(told: Records) -> str:
    """What a run went through: goodput, restarts, skipped steps and samples, saves."""
    shares = [event["goodput"] for event in told if "goodput" in event]
    starts = sum(event["event"] in ("start", "resume") for event in told)
    # a run that was sent back to an earlier step has skipped the same one again
    skips = {event["samples"]: event for event in told if event["event"] == "skip"}
    samples = sum(len(event.get("keys", ())) for event in skips.values())
    stalls = [event["stall_s"] for event in told if event["event"] == "save" and "stall_s" in event]
    goodput = f"Goodput {shares[-1]:.1%}, " if shares else ""
    restarts = count(max(0, starts - 1), "restart")
    saves = count(len(stalls), "save") + (
        f" (median stall {median(stalls):.2g} s)" if stalls else ""
    )
    return (
        f"{goodput}{restarts}, {count(len(skips), 'skipped step')} "
        f"(with {count(samples, 'sample')}), {saves}."
    )


def last_preview(run: Path) -> str:
    """The newest preview of a run, under what its rows show."""
    files = sorted((run / "images").glob("images-*.png"))
    if not files:
        return ""
    with Image.open(files[-1]) as image:
        rows = image.info.get("Description", "")
        width = image.width
    images = int(files[-1].stem.removeprefix("images-"))
    text = f"Preview after {images} images" + (f". Rows, from the top: {rows}" if rows else "")
    shown = picture(files[-1], text)
    wide = width if width > WIDE else 2 * width
    return f"<p class=below>{escape(text)}.</p><div style='max-width:{wide}px'>{shown}</div>"


# ---- curves ----


@dataclass(frozen=True)
class Chart:
    """One small chart: its lines by metric and label, and the baseline from the summary. With
    `across` its lines are curves of the newest validation, along what is named there."""

    title: str
    lines: Mapping[str, str]
    floor: str = ""
    floor_label: str = ""
    across: str = ""


VQGAN_CHARTS = (
    Chart("Reconstruction loss", {"train/rec": "train"}),
    Chart("LPIPS", {"train/perceptual": "train", "val/lpips": "val"},
          "val_lpips_mean_colour", "mean colour"),
    Chart("Validation PSNR, dB", {"val/psnr": "val"}, "val_psnr_mean_colour", "mean colour"),
    Chart("GAN losses", {"train/gan_g": "generator", "train/gan_d": "discriminator"}),
    Chart("Adaptive weight of the GAN", {"train/adaptive_weight": "train"}),
    Chart("Codes in use, share", {"train/codebook_usage": "train", "val/codebook_usage": "val"}),
    Chart("Codebook perplexity", {"train/codebook_perplexity": "train",
                                  "val/codebook_perplexity": "val"}),
)  # fmt: skip
LABEL_MAP_CHARTS = (
    Chart("Cross-entropy", {"train/bce": "train", "val/bce": "val"}),
    Chart("Pixels right, share", {"val/pixel_accuracy": "val"}),
    Chart("Intersection over union, mean of classes", {"val/mean_iou": "val"}),
    *VQGAN_CHARTS[-2:],
)

SPEED_CHARTS = (
    Chart("Images per second", {"throughput/images_per_s": "training"}),
    Chart("Model FLOPs utilization, share of the peak", {"throughput/mfu": "training"}),
    Chart("Waits for data, share of the time", {"throughput/data_wait_fraction": "first rank",
                                                "ranks/data_wait_max": "the longest of a rank"}),
    Chart("Peak of memory, GiB", {"throughput/memory_peak_gib": "largest of a rank"}),
)  # fmt: skip


def token_charts(measure: str) -> tuple[Chart, ...]:
    """Those of a prior, by the name of its negative log-likelihood: `nll` unless it is another."""
    named = "Loss" if measure == "nll" else f"Loss ({measure.replace('_', ' ')})"
    loss = {f"train/{measure}": "train", f"val/{measure}": "val"}
    if measure == "nll":
        loss["train/loss"] = "train"  # of runs from before it had a name
    position = {f"val/{measure}_by_position": "val"}
    return (
        Chart(f"{named}, nats per token", loss, "unigram_entropy", "code frequencies"),
        Chart("Tokens predicted right, share", {"val/accuracy": "val"}),
        Chart("Bits per dimension of the image", {"val/bits_per_dim": "val"}),
        Chart(f"{named} by position, nats", position, across="position in the sequence"),
    )


BY_POSITION = "_by_position"
WIDE = 600  # pixels, of a picture that is shown in its own size; smaller ones are doubled

# Colours in matplotlib's output that are replaced by the page's own, light or dark.
INK, LINE, SERIES = "#000001", "#000002", ("#000003", "#000004")
VARIABLES = {INK: "--soft", LINE: "--line", SERIES[0]: "--first", SERIES[1]: "--second"}


Line = tuple[list[float], list[float]]


def charts(rows: Records, summary: Mapping[str, Any], best: Mapping[str, Any] | None = None) -> str:
    """Every chart for which a run has metrics, all over the same range of images; the `best`
    validation (its event) is marked where its metric is drawn."""
    end = max((row["samples"] for row in rows), default=1)
    drawn = []
    for chart in charts_of(rows):
        lines = _curves(rows, chart) if chart.across else _lines(rows, chart)
        if not lines:
            continue
        if chart.floor in summary:
            lines[chart.floor_label] = ([0, end], [summary[chart.floor]] * 2)
        mark = None
        if best is not None and best["metric"] in chart.lines:
            mark = (best["samples"], best["value"])
        caption = f"{escape(chart.title)}{_legend(lines, chart)}"
        svg = _svg(lines, chart, end, mark)
        drawn.append(f"<figure><figcaption>{caption}</figcaption>{svg}</figure>")
    return f"<div class=charts>{''.join(drawn)}</div>" if drawn else ""


def charts_of(rows: Records) -> tuple[Chart, ...]:
    """The charts of the stage that a run is of, and those of its speed."""
    return (*stage_charts(rows), *SPEED_CHARTS)


def stage_charts(rows: Records) -> tuple[Chart, ...]:
    """The charts of the stage that a run is of."""
    names = set().union(*rows)
    if "train/rec" in names:
        return VQGAN_CHARTS
    if "train/bce" in names:
        return LABEL_MAP_CHARTS
    curves = (name for name in names if name.endswith(BY_POSITION))
    measure = next(curves, "nll").removeprefix("val/").removesuffix(BY_POSITION)
    return token_charts(measure)


def _lines(rows: Records, chart: Chart) -> dict[str, Line]:
    """The lines of a chart by label; a label has the first of its metrics that the run has."""
    lines: dict[str, Line] = {}
    for name, label in chart.lines.items():
        points = [
            (row["samples"], row[name])
            for row in rows
            if isinstance(row.get(name), int | float) and math.isfinite(row[name])
        ]
        if points and label not in lines:
            lines[label] = ([samples for samples, _ in points], [value for _, value in points])
    return lines


def _curves(rows: Records, chart: Chart) -> dict[str, Line]:
    """The newest curves of a chart by label; what was not measured leaves a gap."""
    lines: dict[str, Line] = {}
    for name, label in chart.lines.items():
        found = [row[name] for row in rows if isinstance(row.get(name), list)]
        if found:
            values = [math.nan if value is None else value for value in found[-1]]
            lines[label] = ([float(place) for place in range(1, len(values) + 1)], values)
    return lines


def _colours(lines: Mapping[str, Line], chart: Chart) -> list[str]:
    names = list(dict.fromkeys(chart.lines.values()))
    return [SERIES[names.index(label)] if label in names else INK for label in lines]


def _legend(lines: Mapping[str, Line], chart: Chart) -> str:
    if len(lines) == 1:
        return ""
    keys = [
        f"<span><i style='background:var({VARIABLES[colour]})'></i>{escape(label)}</span>"
        for label, colour in zip(lines, _colours(lines, chart), strict=True)
    ]
    return f"<span class=keys>{''.join(keys)}</span>"


def _svg(
    lines: Mapping[str, Line], chart: Chart, end: float, mark: tuple[float, float] | None = None
) -> str:
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9, "axes.edgecolor": LINE,
        "axes.labelcolor": INK, "xtick.color": LINE, "ytick.color": LINE, "grid.color": LINE,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.spines.left": False, "ytick.left": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.4), layout="constrained")
        axes = figure.add_subplot()
        for (label, line), colour in zip(lines.items(), _colours(lines, chart), strict=True):
            if label == chart.floor_label:
                axes.plot(*line, color=colour, linewidth=1, linestyle="--")
                continue
            marker = "o" if len(line[0]) < 12 else ""
            axes.plot(*line, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
        if mark is not None:
            axes.plot(*mark, marker="o", markersize=8, color=SERIES[1], fillstyle="none")
            side = "right" if mark[0] > end / 2 else "left"
            axes.annotate("best", mark, (0, 9), textcoords="offset points", ha=side, color=INK)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(chart.across or "images seen")
        if not chart.across:
            axes.set_xlim(0, end)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def records(run: Path) -> Records:
    """Read metrics.jsonl of a run directory."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file} is missing: name a run directory (run.dir)")
    return lines_of(file)


def lines_of(file: Path) -> Records:
    """The objects in a file that has one on each line; a truncated line is skipped."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


# ---- page ----

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f22;
  --soft: #5d636b; --line: #dcdad5; --first: #1f6f8b; --second: #c4622d; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1d2024; --ink: #e8e6e1;
  --soft: #9aa1aa; --line: #33373d; --first: #6bb8d4; --second: #eb9a63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 1.5rem;
  font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 620; margin: 0 0 .75rem; }
h3 { font-size: .85rem; font-weight: 500; color: var(--soft); margin: 0 0 .3rem; }
p { margin: 0 0 1rem; color: var(--soft); max-width: 70ch; }
small { color: var(--soft); font-size: .82em; font-weight: 400; }
section { margin-top: 3rem; }

.cards, .charts, .pairs, .pair, .rows, .strip, .phases { display: grid; }
.cards { gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .8rem 1rem; display: flex; flex-direction: column; }
.card span { color: var(--soft); font-size: .85rem; }
.card b { font-size: 1.4rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card b small { font-size: .6em; line-height: 1; }

img { display: block; width: 100%; height: auto; border-radius: 3px; }
.pairs { gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(clamp(4.6rem, 8vw, 5.5rem), 1fr)); }
.pair { gap: 2px; }
.rows { gap: 1.1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.strip { gap: 3px; grid-template-columns: repeat(auto-fill, minmax(4.2rem, 1fr)); }

.below { margin: 1.2rem 0 .6rem; }
.charts { gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; padding: .8rem .9rem .4rem; }
figcaption { font-size: .9rem; font-weight: 550; display: flex; flex-wrap: wrap;
  justify-content: space-between; gap: 0 1rem; margin-bottom: .3rem; }
.keys { display: flex; gap: .9rem; font-weight: 400; color: var(--soft); }
.keys i { display: inline-block; width: .9em; height: 3px; border-radius: 2px;
  margin-right: .4em; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }

table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: 400; vertical-align: baseline;
  padding: .45rem 1.5rem .45rem 0; border-bottom: 1px solid var(--line); }
td b { font-weight: 600; margin-right: .6em; }
td small { display: inline-block; }

.phases { gap: .5rem; max-width: 60rem; }
.phase { display: grid; grid-template-columns: 10rem 1fr 5.5rem 2.6rem; gap: 0 .9rem;
  align-items: center; font-size: .92rem; font-variant-numeric: tabular-nums; }
.phase i, .phase b { display: block; height: .8rem; border-radius: 3px; }
.phase i { background: var(--line); }
.phase b { background: var(--first); min-width: 2px; }
.phase span:nth-child(n+3) { text-align: right; color: var(--soft); }
@media (max-width: 36rem) {
  .phase { grid-template-columns: 1fr 5.5rem 2.6rem; }
  .phase i { order: 1; grid-column: 1 / -1; }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
{body}
</main></body>
</html>
"""


if __name__ == "__main__":
    cli.run(main)
