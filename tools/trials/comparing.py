"""What two runs have in common: losses, models, checkpoints, and the samples of each batch."""

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

Line = dict[str, Any]
UNSTABLE = re.compile("time$|throughput/|ranks/")  # what no two runs share
EXPORTS = ("export", "export-best")


def lines(file: Path) -> list[Line]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run_dir: Path) -> list[Line]:
    """What a run has logged, without times and speeds."""
    return [
        {name: value for name, value in line.items() if not UNSTABLE.search(name)}
        for line in lines(run_dir / "metrics.jsonl")
    ]


def samples(run_dir: Path) -> dict[int, set[tuple[str, ...]]]:
    """The keys of each global batch, by the images seen after it: one set of keys, where all starts
    that came so far agree. What a killed start did not write on all ranks does not count."""
    starts: dict[str, list[dict[int, list[str]]]] = defaultdict(list)
    for file in sorted((run_dir.parent / f"{run_dir.name}-starts").glob("*.samples")):
        whole = file.read_text().split("\n")[:-1]
        rows = [line.split() for line in whole]
        starts[file.name.partition("-")[0]].append({int(row[0]): row[1:] for row in rows})
    batches: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for ranks in starts.values():
        for images in set.intersection(*(set(rank) for rank in ranks)):
            batches[images].add(tuple(sorted(key for rank in ranks for key in rank[images])))
    return batches


def newest(run_dir: Path) -> Path:
    """The last checkpoint."""
    return max(path for path in (run_dir / "checkpoints").iterdir() if path.suffix != ".tmp")


def differing_bits(run_dir: Path, other: Path) -> list[str]:
    """What is not the same to the bit in two runs, each in a few words."""
    found = []
    one, two = metrics(run_dir), metrics(other)
    if one != two:
        found.append(f"metrics.jsonl, {first_difference(one, two)}")
    folders = [name for name in EXPORTS if (other / name).is_dir()]
    pairs = [(run_dir / name, other / name) for name in folders]
    for mine, theirs in [*pairs, (newest(run_dir), newest(other))]:
        names = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
        names |= {path.relative_to(mine) for path in mine.rglob("*") if path.is_file()}
        for name in sorted(names):
            files = (mine / name, theirs / name)
            if not all(map(Path.is_file, files)) or len({file.read_bytes() for file in files}) > 1:
                found.append(f"{mine.relative_to(run_dir)}/{name}")
    return found + differing_samples(run_dir, other)


def first_difference(one: list[Line], two: list[Line]) -> str:
    """Where two logs part."""
    for mine, theirs in zip(one, two, strict=False):
        if mine != theirs:
            names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            return f"step {mine['step']}: {', '.join(sorted(names)[:4])}"
    return f"{len(one)} lines instead of {len(two)}"


def differing_samples(run_dir: Path, other: Path) -> list[str]:
    """The global batches that did not have the samples of the other run, or not every time."""
    one, two = samples(run_dir), samples(other)
    wrong = sorted(images for images in {**one, **two} if one.get(images) != two.get(images))
    return [f"samples of the batch that ends at image {images}" for images in wrong[:3]]


@dataclass(frozen=True)
class Distance:
    """How far two runs are apart: their losses at most, relative; and the difference of all weights
    of the export, by its norm against theirs."""

    losses: float
    weights: float

    def beyond(self, other: "Distance") -> "Distance":
        """The larger of two, each for itself."""
        return Distance(max(self.losses, other.losses), max(self.weights, other.weights))

    def above(self, limit: "Distance") -> list[str]:
        """What is not within a limit, in words."""
        pairs = ((name, value, getattr(limit, name)) for name, value in asdict(self).items())
        return [
            f"{name} differ by {value:.1e}, more than {most:.0e}"
            for name, value, most in pairs
            if not value <= most
        ]


def distance(run_dir: Path, other: Path) -> Distance:
    """How far two runs are apart by rounding."""
    losses = 0.0
    for mine, theirs in zip(metrics(run_dir), metrics(other), strict=True):
        for name in theirs:
            if name.endswith(("/loss", "/nll", "/rec")):
                losses = max(losses, abs(mine[name] - theirs[name]) / abs(theirs[name]))
    ours, weights = (
        load_file(folder / "export" / "model.safetensors") for folder in (run_dir, other)
    )
    apart = sum((ours[name] - weights[name]).double().square().sum().item() for name in weights)
    size = sum(tensor.double().square().sum().item() for tensor in weights.values())
    return Distance(losses, (apart / size) ** 0.5)
