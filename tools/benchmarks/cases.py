"""Cases of a benchmark that are measured in several forms: ours and the original's, by turns."""

import argparse
import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from benchmarks import original
from benchmarks.machine import DTYPES, better, default_device, describe, measured_peaks
from benchmarks.rows import Row, Rows, Run, rows_of, this_run
from benchmarks.tables import heading, lines
from benchmarks.timing import PeakMemory, Sample, by_turns, quartiles, ratio
from taming_dist import cli
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.tf32 import EXACT, TF32_CHOICES, use_tf32
from taming_dist.errors import UserError
from taming_dist.training.clock import Clock

WARM_UP = 2  # calls: the second one has the optimizer's state
BASELINE_PATHS = ("tools/benchmarks/original",)
Work = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to do the work. `build` makes what it needs and gives one call of it; `notes` makes
    more figures of what a call returns."""

    name: str
    precision: str
    build: Callable[[], Work]
    notes: Callable[[Any], dict[str, float]] | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.precision}"


@dataclasses.dataclass(frozen=True)
class Case:
    """Work of `amount` things (images of `unit` images/s, say) in a call that takes `flop`, and is
    held against the machine's `peak` (gemm or conv). `paths`: code that it depends on."""

    name: str
    unit: str
    amount: int
    flop: float
    peak: str
    paths: Sequence[str]
    forms: Sequence[Form]


def add_arguments(parser: argparse.ArgumentParser, cases: Sequence[str]) -> None:
    """What all benchmarks of this kind take."""
    parser.add_argument("--cases", choices=cases, nargs="+", default=cases)
    parser.add_argument("--rounds", type=cli.COUNT, default=7, help="of all forms, by turns")
    parser.add_argument("--threads", type=cli.COUNT, help="of the CPU, default: one per core")
    parser.add_argument("--baseline", action="store_true", help="the original's arithmetic, too")
    parser.add_argument("--precisions", choices=DTYPES, nargs="+", help="default: fp32, bf16")


def set_up(arguments: argparse.Namespace, sizes: Mapping[str, Mapping[str, int]]) -> torch.device:
    """Threads, precisions and, where none are given, the `sizes` of the kind of device; gives the
    device."""
    logging.getLogger("taming_dist.pretrained").setLevel(logging.ERROR)  # weights are random
    device = default_device()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.precisions is None:
        arguments.precisions = ["fp32" if device.type == "cpu" else "tf32", "bf16"]
    for name, value in sizes[device.type].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return device


def steps_of(recipe: Any, batch: Any, images: int) -> Work:
    """An optimizer step of a recipe on one batch of so many images, again and again."""
    clock = Clock(images, 2**31)

    def call() -> None:
        for _ in recipe.train_step([batch], clock):
            pass
        clock.tick()

    return call


def forms_of(
    arguments: argparse.Namespace,
    ours: Callable[[str], Work],
    theirs: Callable[[str], Work],
    notes: Callable[[Any], dict[str, float]] | None = None,
) -> list[Form]:
    """Ours and, if it is asked for, the original in each precision: the highest first, for
    DeepSpeed does not forget that there was autocast."""
    found = []
    for precision in sorted(arguments.precisions, key=list(DTYPES).index):
        if arguments.baseline:
            build = lambda precision=precision: theirs(precision)  # noqa: E731
            found.append(Form("original", precision, build))
        build = lambda precision=precision: ours(precision)  # noqa: E731
        found.append(Form("ours", precision, build, notes))
    return found


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What benchmarks of a training step take beside."""
    parser.add_argument("--engine", nargs="+", default=[], metavar="KEY=VALUE",
                        help="settings of ours, as zero=2 graphs=true")  # fmt: skip


def engine_of(arguments: argparse.Namespace, precision: str) -> EngineConfig:
    """The settings of an engine at a precision of these benchmarks.

    Raises:
        UserError: --engine names another, or a value that it does not take.
    """
    own = {
        "precision": "fp32" if precision == "tf32" else precision,
        "tf32": "all" if precision == "tf32" else "none",
    }
    try:
        asked = OmegaConf.from_dotlist(arguments.engine)
        merged = OmegaConf.merge(OmegaConf.structured(EngineConfig), own, asked)
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--engine {' '.join(arguments.engine)}: {reason}") from error
    assert isinstance(found, EngineConfig)
    return found


def engine_name(arguments: argparse.Namespace) -> str:
    """The settings that were asked for, at the end of a case's name."""
    return "".join(f", {setting}" for setting in arguments.engine)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What bf16 means outside an engine; nothing at other precisions."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def measured(
    benchmark: str, cases: Iterator[Case], arguments: argparse.Namespace, device: torch.device
) -> Rows:
    """Measure one case after the other between two measurements of the machine's peaks, and print
    a table."""
    begun = this_run(describe(device, {}))
    before = measured_peaks(device, arguments.precisions)
    rows = [row for case in cases for row in measure(benchmark, case, arguments.rounds, device)]
    peaks = better(before, measured_peaks(device, arguments.precisions))
    rows = [dataclasses.replace(row, share=share(row, peaks)) for row in rows]
    found = Rows(dataclasses.replace(begun, machine=describe(device, peaks)), rows)
    print("\n".join([heading(found.run), *lines(found.rows)]), flush=True)
    return found


def shown(benchmark: str, figures: Mapping[str, float], paths: Sequence[str], run: Run) -> Rows:
    """Figures by name as rows, printed."""
    found = Rows(run, rows_of(benchmark, figures, paths))
    print("\n".join([heading(found.run), *lines(found.rows)]), flush=True)
    return found


def measure(benchmark: str, case: Case, rounds: int, device: torch.device) -> list[Row]:
    """The rows of a case."""
    works: dict[str, Work] = {}
    rows: dict[str, Row] = {}
    for form in case.forms:
        watched = PeakMemory(device)
        work = works[str(form)] = as_set(form, form.build(), device)
        answers = [work() for _ in range(WARM_UP)]
        held = watched.read()
        rows[str(form)] = Row(
            benchmark,
            case.name,
            form.name,
            value=0.0,
            unit=case.unit,
            precision=form.precision,
            memory_mb=None if held is None else held / 1e6,
            gflop=case.flop / 1e9,
            peak=f"{case.peak} {form.precision}",
            notes={} if form.notes is None else form.notes(answers[-1]),
            paths=(*case.paths, *BASELINE_PATHS),
        )
        del answers
    samples = by_turns(works, rounds, device)
    base = next((form for form in case.forms if form.name == "original"), None)
    return [timed(row, case.amount, samples, name, base) for name, row in rows.items()]


def timed(
    row: Row, amount: int, samples: Mapping[str, list[Sample]], name: str, base: Form | None
) -> Row:
    """The row with the times of its samples, those called `name`."""
    own = samples[name]
    low, median, high = quartiles(own)
    return dataclasses.replace(
        row,
        value=amount / median,
        ms=1e3 * median,
        low_ms=1e3 * low,
        high_ms=1e3 * high,
        cpu_ms=1e3 * statistics.median(sample.cpu for sample in own),
        times=None if base is None else ratio(own, samples[str(base)]),
        against="" if base is None else base.precision,
    )


def as_set(form: Form, work: Work, device: torch.device) -> Work:
    """The work with fp32 as the form's precision means it and as its code sets it, whatever ran
    before."""
    allowed = TF32_CHOICES["all"] if form.precision == "tf32" else EXACT

    def call() -> Any:
        if form.name == "original" and device.type == "cpu":
            original.as_torch_is()
        else:
            use_tf32(allowed)
        return work()

    return call


def share(row: Row, peaks: Mapping[str, float]) -> float | None:
    """How much of its peak a row reaches."""
    peak = peaks.get(row.peak or "")
    if row.gflop is None or row.ms is None or peak is None:
        return None
    return row.gflop / (row.ms / 1e3) / peak
