"""`tools/benchmark.py saving`: what a checkpoint costs a run.

A transformer is trained on made codes, on one rank with one thread, and saved now and then: the
stall of a step, how long the thread writes, and what the step after it takes, stall included. AdamW
in fp32: a checkpoint has three times the weights, and an export is written beside it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from trials.comparing import lines
from trials.training import arguments, make_codes

from taming_dist import cli

SIZES = {"25 M": (8, 512), "100 M": (14, 768)}  # layers, width
EVERY, BATCH = 8, 16  # steps per save, images per step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--saves", type=cli.COUNT, default=3, help="of each size")
    parser.add_argument("--size", choices=list(SIZES), action="append", help="default: all")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train and save each size, and print a line for it."""
    print(f"{'parameters':10} {'step':>7} {'stall':>15} {'writing':>15} {'step after it':>15}")
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_codes(Path(scratch) / "codes", np.random.default_rng(0))
        for size in given.size or SIZES:
            run_dir = Path(scratch) / size.replace(" ", "")
            train(size, Path(scratch) / "codes", run_dir, EVERY * given.saves + EVERY // 2)
            found = figures[size] = measured(run_dir)
            ranges = (f"{min(s):.2f} to {max(s):.2f}" for s in list(found.values())[1:])
            print(f"{size:10} {found['step'][0]:7.2f}" + "".join(f" {text:>15}" for text in ranges))
    return figures


def train(size: str, codes: Path, run_dir: Path, steps: int) -> None:
    """A run with a checkpoint after every `EVERY`-th step and after the last."""
    layers, width = SIZES[size]
    overrides = [
        f"model.layers={layers}", f"model.width={width}", "model.heads=8", f"run.dir={run_dir}",
        f"train.checkpoint_every={EVERY}", "train.validate_every=0", "engine.persist_below=0",
        f"data.global_batch={BATCH}", f"data.micro_batch={BATCH}", "optim.ema_half_life=0",
    ]  # fmt: skip
    command = [sys.executable, "-m", "taming_dist.train"]
    command += arguments("prior", codes, steps, overrides)
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=threads, stdout=subprocess.DEVNULL)


def measured(run_dir: Path) -> dict[str, list[float]]:
    """Seconds: the median step in which nothing was written; of each save, the stall and the time
    until it was written; and the step after it, with the stall."""
    saves = [e for e in lines(run_dir / "events.jsonl") if e["event"] == "save"]
    logged = [line for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]
    alone, beside = [], []
    for before, after in zip(logged[1:], logged[2:], strict=False):
        if before["step"] % EVERY == 0:  # the save begins after the line of its step
            beside.append(after["time"] - before["time"])
        elif after["step"] % EVERY > EVERY // 2:  # it is written by then
            alone.append(after["time"] - before["time"])
    return {
        "step": [statistics.median(alone)],
        "stall": [save["stall_s"] for save in saves],
        "writing": [save["duration_s"] for save in saves],
        "step after it": beside,
    }
