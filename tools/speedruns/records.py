"""The record of one run of a recipe: how good it was after how long, on what and by which code."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from benchmarks.machine import Machine
from benchmarks.rows import Run

from taming_dist.atomic import write_bytes
from taming_dist.data.images import COLUMNS
from taming_dist.errors import UserError
from taming_dist.evaluation.protocol import CENTRE, Protocol
from taming_dist.formats.manifest import resolve
from taming_dist.formats.strict_json import json_lines, read_json, write_json
from taming_dist.inception import inception
from taming_dist.models.modalities import RGB
from taming_dist.models.vqgan import VQGAN

BEGUN, METRICS = "begun.json", "metrics.jsonl"
MEMORY = "throughput/memory_peak_gib"
FIGURES = ("lpips", "psnr", "codebook_usage", "codebook_perplexity")  # of validation
MOST_LINES = 100  # of training, in a log


@dataclasses.dataclass(frozen=True)
class Point:
    """A measurement after `images` seen; `seconds`: of steps alone, see docs/speedrun.md."""

    step: int
    images: int
    seconds: float
    rfid: float
    lpips: float
    psnr: float
    codebook_usage: float
    codebook_perplexity: float


@dataclasses.dataclass(frozen=True)
class Probe:
    """The keys that a probe was given, the hash of its protocol, and its figures by name."""

    asked: Sequence[str]
    protocol: str
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """One run of a recipe. `overrides`: what was changed of it; `train`: the fingerprint of the
    images learned from; `protocol`: that of its rFID, with its `hash`; `tokens` of an image, each
    one of `codes`; `wall_seconds`: with starts and measurements; `log`: a file beside this one, ""
    if there is none; `memory_gib`: the peak of a rank, of the GPU or of the process; `probe`: what
    `taming_dist.evaluate probe=true` found of the codes."""

    recipe: str
    seed: int
    overrides: Sequence[str]
    run: Run
    train: str
    protocol: Mapping[str, Any]
    tokens: int
    codes: int
    wall_seconds: float
    points: Sequence[Point]
    log: str
    memory_gib: float | None = None
    probe: Probe | None = None

    @property
    def last(self) -> Point:
        """The measurement at the end."""
        return self.points[-1]

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.run.date}-{self.recipe}-seed{self.seed}-{self.run.commit[:7] or 'unknown'}"

    @property
    def images_per_second(self) -> float:
        """Of steps that count: without starts, waiting and measurements."""
        return self.last.images / self.last.seconds

    def reached(self, rfid: float) -> Point | None:
        """The first measurement that is as good; None: there is none."""
        return next((point for point in self.points if point.rfid <= rfid), None)


def begin(folder: Path, run: Run) -> Run:
    """Note in the folder of a run that begins now by which code and where; of one that goes on,
    check that it is still that code.

    Raises:
        UserError: it is another.
    """
    file = folder / BEGUN
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, dataclasses.asdict(run))
        return run
    before = run_of(read_json(file))
    if (before.commit, list(before.changed)) != (run.commit, list(run.changed)):
        raise UserError(
            f"{folder} was begun by commit {before.commit}, and this is {run.commit}, or has other "
            f"changes: give another --out"
        )
    return before


def read_run(folder: Path, recipe: str, seed: int, overrides: Sequence[str]) -> Record:
    """The record of a run that has finished.

    Raises:
        UserError: it has not, or its steps and measurements were not logged together.
    """
    ends = [event for event in lines_of(folder / "events.jsonl") if event.get("event") == "exit"]
    if not ends or not ends[-1]["finished"]:
        raise UserError(f"{folder}: the run has not finished, run the same command again")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    points = list(points_of(folder))
    if not points:
        raise UserError(f"{folder}: rFID was not measured, set train.evaluate_every")
    model = VQGAN.from_pretrained(folder / "export").config
    size = config["data"]["size"]
    tokens = math.prod(model.code_shape(size, size))
    return Record(
        recipe, seed, list(overrides), run_of(read_json(folder / BEGUN)),
        resolve(config["data"]["train"]).fingerprint, protocol_of(folder, config).record(),
        tokens, model.vocabulary, ends[-1]["running_s"], points, "",
        max(line.get(MEMORY, 0.0) for line in lines_of(folder / METRICS)) or None,
    )  # fmt: skip


def protocol_of(folder: Path, config: Mapping[str, Any]) -> Protocol:
    """How the rFID within a run was measured, as `taming_dist.evaluate` would tell it."""
    counts = [line["val/images"] for line in lines_of(folder / METRICS) if "val/images" in line]
    network = inception(config["train"]["evaluate_features"])
    reference = resolve(config["data"]["val"]).fingerprint
    method = COLUMNS[RGB.column].method.name.lower()
    return Protocol(
        int(counts[-1]), int(counts[-1]), reference, config["data"]["size"], CENTRE, method,
        "uint8", network.digest, network.layer,
    )  # fmt: skip


def points_of(folder: Path) -> Iterator[Point]:
    """The measurements of a run, in order."""
    moments: dict[int, dict[str, Any]] = {}  # training, validation and rFID have a line each
    for line in lines_of(folder / METRICS):
        moments.setdefault(line["samples"], {}).update(line)
    for images, found in sorted(moments.items()):
        if "eval/rfid" not in found:
            continue
        try:
            seconds = found["throughput/goodput"] * found["throughput/running_s"]
            figures = [found[f"val/{name}"] for name in FIGURES]
        except KeyError as missing:
            raise UserError(
                f"{folder}: step {found['step']} has no {missing}: let train.evaluate_every be a "
                f"multiple of train.log_every and of train.validate_every"
            ) from missing
        yield Point(found["step"], images, seconds, found["eval/rfid"], *figures)


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines that a run has logged; `UserError` if there is no such file."""
    try:
        return [found for _, found in json_lines(file) if found is not None]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), run the recipe") from error


def save(record: Record, folder: Path) -> Path:
    """Write a record into a folder; gives its file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{record.name}.json"
    write_json(file, dataclasses.asdict(record))
    return file


def save_log(record: Record, run: Path, folder: Path) -> Record:
    """Write the log of a record, each measurement and some lines of training of the folder `run`;
    gives the record that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines_of(run / METRICS)
    every = max(1, -(-sum("train/loss" in line for line in lines) // MOST_LINES))
    place = count()
    kept = [line for line in lines if "train/loss" not in line or next(place) % every == 0]
    text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in kept)
    named = dataclasses.replace(record, log=f"{record.name}.jsonl")
    write_bytes(folder / named.log, text.encode())
    return named


def load(folder: Path) -> list[Record]:
    """The records in a folder, by name.

    Raises:
        UserError: a file is none, or there are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder} has no records: run a recipe, or give another folder")
    return [record_of(file) for file in files]


def record_of(file: Path) -> Record:
    given = read_json(file)
    try:
        parts: dict[str, Any] = {
            "run": run_of(given["run"]),
            "points": [Point(**each) for each in given["points"]],
        }
        if given.get("probe") is not None:
            parts["probe"] = Probe(**given["probe"])
        record = Record(**(given | parts))
        assert record.points
        record.protocol["hash"]
    except (TypeError, KeyError, AttributeError, AssertionError) as error:
        advice = "give what tools/speedrun.py or tools/compare_tokenizers.py wrote"
        raise UserError(f"{file} is no record of a run ({error!r}): {advice}") from error
    return record


def run_of(given: Mapping[str, Any]) -> Run:
    """A `Run` from its JSON."""
    return Run(**(dict(given) | {"machine": Machine(**given["machine"])}))
