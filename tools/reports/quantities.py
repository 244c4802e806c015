"""Which quantities are drawn, by the kind of a run, and the points of their lines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reports.reading import UTILIZATION, RunRecord, number

POINTS = 300  # of a line; of more, neighbours are drawn as their mean
BY_POSITION = "_by_position"
FIRST_STAGE, LABEL_MAPS, TOKENS, UNKNOWN = (
    "stage 1: VQGAN", "stage 1: label maps", "stage 2: transformer", "no numbers yet"
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A chart: its series by metric and label (the first metric that a run has of a label counts),
    and the name of the baseline in the summary. With `across` it shows curves of the newest
    validation, along what is named there."""

    title: str
    series: Mapping[str, str]
    floor: str = ""
    floor_label: str = ""
    across: str = ""


@dataclass(frozen=True)
class Line:
    """A series of a run: `x` by the name of the axis, `y`; None is a gap."""

    run: RunRecord
    label: str
    x: dict[str, list[float]]
    y: list[float | None]


@dataclass(frozen=True)
class Chart:
    """A quantity with its lines, the `ends` of its axes by name, and `marks`: the best validations,
    as runs with their place on each axis and their value."""

    quantity: Quantity
    lines: list[Line]
    ends: dict[str, float]
    floor: float | None = None
    marks: list[tuple[RunRecord, dict[str, list[float]], float]] = field(default_factory=list)


VQGAN_QUANTITIES = (
    Quantity("Reconstruction loss", {"train/rec": "train"}),
    Quantity("LPIPS", {"train/perceptual": "train", "val/lpips": "val"},
             "val_lpips_mean_colour", "mean colour"),
    Quantity("Validation PSNR, dB", {"val/psnr": "val"}, "val_psnr_mean_colour", "mean colour"),
    Quantity("GAN losses", {"train/gan_g": "generator", "train/gan_d": "discriminator"}),
    Quantity("Adaptive weight of the GAN", {"train/adaptive_weight": "train"}),
    Quantity("Codes in use, share", {"train/codebook_usage": "train",
                                     "val/codebook_usage": "val"}),
    Quantity("Codebook perplexity", {"train/codebook_perplexity": "train",
                                     "val/codebook_perplexity": "val"}),
)  # fmt: skip
LABEL_MAP_QUANTITIES = (
    Quantity("Cross-entropy", {"train/bce": "train", "val/bce": "val"}),
    Quantity("Pixels right, share", {"val/pixel_accuracy": "val"}),
    Quantity("Intersection over union, mean of classes", {"val/mean_iou": "val"}),
    *VQGAN_QUANTITIES[-2:],
)
SPEED_QUANTITIES = (
    Quantity("Images per second", {"throughput/images_per_s": "training"}),
    Quantity("Model FLOPs utilization, share of the peak", {UTILIZATION: "training"}),
    Quantity("Waits for data, share of the time", {"throughput/data_wait_fraction": "first rank",
                                                   "ranks/data_wait_max": "longest of a rank"}),
    Quantity("Peak of memory, GiB", {"throughput/memory_peak_gib": "largest of a rank"}),
    Quantity("Goodput, share of the running time", {"throughput/goodput": "all starts"}),
)  # fmt: skip


def kind_of(run: RunRecord) -> str:
    """The stage that a run is of, by what it logs."""
    logged = set().union(*run.rows)
    if "train/rec" in logged:
        return FIRST_STAGE
    if "train/bce" in logged:
        return LABEL_MAPS
    return TOKENS if any(name.startswith(("train/", "val/")) for name in logged) else UNKNOWN


def quantities_of(runs: Sequence[RunRecord]) -> list[Quantity]:
    """What is drawn of runs of one kind."""
    kind = kind_of(runs[0])
    if kind in (FIRST_STAGE, LABEL_MAPS):
        own = VQGAN_QUANTITIES if kind == FIRST_STAGE else LABEL_MAP_QUANTITIES
        return [*own, *SPEED_QUANTITIES]
    measures = dict.fromkeys(measure_of(run) for run in runs)
    tokens = {each.title: each for measure in measures for each in token_quantities(measure)}
    return [*tokens.values(), *SPEED_QUANTITIES]


def measure_of(run: RunRecord) -> str:
    """The name of a prior's negative log-likelihood: `nll` unless it is another."""
    logged = set().union(*run.rows)
    curves = (name for name in sorted(logged) if name.endswith(BY_POSITION))
    return next(curves, "nll").removeprefix("val/").removesuffix(BY_POSITION)


def token_quantities(measure: str) -> tuple[Quantity, ...]:
    """Those of a prior, by the name of its negative log-likelihood."""
    named = "Loss" if measure == "nll" else f"Loss ({measure.replace('_', ' ')})"
    loss = {f"train/{measure}": "train", f"val/{measure}": "val"}
    if measure == "nll":
        loss["train/loss"] = "train"  # of runs from before it had a name
    position = {f"val/{measure}{BY_POSITION}": "val"}
    return (
        Quantity(f"{named}, nats per token", loss, "unigram_entropy", "code frequencies"),
        Quantity("Tokens predicted right, share", {"val/accuracy": "val"}),
        Quantity("Bits per dimension of the image", {"val/bits_per_dim": "val"}),
        Quantity(f"{named} by position, nats", position, across="position in the sequence"),
    )


def lines_of(run: RunRecord, quantity: Quantity) -> list[Line]:
    """The lines of a run in a chart."""
    found: dict[str, Line] = {}
    for metric, label in quantity.series.items():
        if metric == UTILIZATION and run.peak_is_wrong:
            continue
        line = (curve if quantity.across else course)(run, metric, label, quantity.across)
        if line is not None:
            found.setdefault(label, line)
    order = list(dict.fromkeys(quantity.series.values()))
    return sorted(found.values(), key=lambda line: order.index(line.label))


def course(run: RunRecord, metric: str, label: str, _: str) -> Line | None:
    """A metric in the course of a run."""
    points = [
        (row["samples"], value)
        for row in run.rows
        if (value := number(row.get(metric))) is not None
    ]
    if not points:
        return None
    images, values = thinned(np.array(sorted(points), dtype=float).T)
    return Line(run, label, run.timeline.at(images.tolist()), values.tolist())


def curve(run: RunRecord, metric: str, label: str, across: str) -> Line | None:
    """The newest of the curves of a metric; what was not measured leaves a gap."""
    found = [row[metric] for row in run.rows if isinstance(row.get(metric), list)]
    if not found:
        return None
    return Line(
        run, label, {across: [float(place) for place in range(1, len(found[-1]) + 1)]},
        [number(value) for value in found[-1]],
    )  # fmt: skip


def thinned(points: np.ndarray) -> np.ndarray:
    """Points [2, n] as at most POINTS means of neighbours; the last point stays as it is."""
    if points.shape[1] <= POINTS:
        return points
    parts = np.array_split(points[:, :-1], POINTS - 1, axis=1)
    return np.stack([*(part.mean(1) for part in parts), points[:, -1]], axis=1)


def charts_of(
    runs: Sequence[RunRecord], floors: Mapping[str, float], bests: Iterable[tuple[RunRecord, dict]]
) -> list[Chart]:
    """Every chart for which one of the runs, all of a kind, has numbers. The axes are as long as
    the longest run. `bests`: the event of the best validation of runs that have one."""
    ends = {
        name: max(float(getattr(run.timeline, name)[-1]) for run in runs) or 1.0
        for name in ("steps", "images", "hours")
    }
    known = list(bests)
    charts = []
    for quantity in quantities_of(runs):
        lines = [line for run in runs for line in lines_of(run, quantity)]
        if not lines:
            continue
        own = ends
        if quantity.across:
            own = {quantity.across: float(max(len(line.y) for line in lines))}
        marks = [
            (run, run.timeline.at([event["samples"]]), event["value"])
            for run, event in known
            if event["metric"] in quantity.series and not quantity.across
        ]
        floor = number(floors.get(quantity.floor))
        charts.append(Chart(quantity, lines, own, floor, marks))
    return charts
