"""`tools/benchmark.py making`: images/s of tools/make_shards.py.

On photographs of 500 x 375 pixels (the middle of ImageNet): storing them as they are, and scaling
them to a short side of 256, each by one process and by two, alternating; medians. On a machine
that has other work images per CPU second say more; they are known of one process only, as the two
are children of a server that is not waited for.
"""

import argparse
import io
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from taming_dist import cli

SIZE = (500, 375)  # width and height
DISTINCT = 50
CASES = {"as they are": (), "scaled to 256": ("--short-side", "256")}
WORKERS = (1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=cli.COUNT, default=2000)
    parser.add_argument("--rounds", type=cli.COUNT, default=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the shards of each case anew, several times, and print images/s."""
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    count = arguments.images
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        num_bytes = write_photographs(photographs, count)
        for number in range(arguments.rounds):
            for case, options in CASES.items():
                for workers in WORKERS:
                    out = Path(folder) / f"{case}-{workers}-{number}"
                    spent = measure(photographs, out, (*options, "--workers", str(workers)))
                    runs[f"{case}, workers: {workers}"].append(spent)
    figures: dict[str, dict[str, float]] = {}
    print(f"{count} images of {num_bytes / count / 1000:.0f} kB")
    print(f"{'images per':32} {'second':>8} {'CPU second':>12}")
    for case, spent_times in runs.items():
        rate, cpu_rate = (count / statistics.median(t) for t in zip(*spent_times, strict=True))
        figures[case] = {"per_second": rate}
        if case.endswith(" 1"):
            figures[case]["per_cpu_second"] = cpu_rate
        print(f"{case:32} {rate:8.0f} {figures[case].get('per_cpu_second', math.nan):12.0f}")
    return figures


def measure(photographs: Path, out: Path, options: tuple[str, ...]) -> tuple[float, float]:
    """Seconds and CPU seconds of one run, from starting Python to the manifest."""
    tool = Path(__file__).parents[1] / "make_shards.py"
    command = [sys.executable, str(tool), "--images", str(photographs), "--out", str(out)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, "--shard-samples", "250", *options], check=True, stdout=subprocess.DEVNULL
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, sum(after[:2]) - sum(before[:2])


def write_photographs(folder: Path, count: int) -> int:
    """Write JPEGs that compress as photographs do: smooth shapes with some grain."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    total = 0
    for number in range(min(DISTINCT, count)):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.array(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(np.float32)
        grainy = smooth + draw.normal(0, 8, smooth.shape)
        encoded = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
        for copy in range(number, count, DISTINCT):
            total += (folder / f"{copy}.jpg").write_bytes(encoded.getvalue())
    return total
