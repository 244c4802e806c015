"""`tools/benchmark.py allocator`: stage 1's step and encoding by settings of glibc (CPU only).

The demo's step on random images, before and after the GAN counts, and encoding by the paper's f16
model, with glibc's default allocator settings and with those that every command sets.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from taming_dist import cli

BATCH, SIZE = 16, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=cli.COUNT, default=12, help="timed steps per case")
    parser.add_argument("--case", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Run every case in a process of its own, alternating, and print the medians."""
    if arguments.case:
        measured = measure(arguments.case == "default", arguments.steps)
        print(json.dumps(measured, allow_nan=False))
        return None
    figures = {}
    for case in ("default", "kept"):
        command = [sys.executable, sys.argv[0], "allocator", "--case", case]
        command += ["--steps", str(arguments.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[case] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'seconds, median':44} {'default':>8} {'kept':>8} {'ratio':>6}")
    for name, default in figures["default"].items():
        kept = figures["kept"][name]
        print(f"{name:44} {default:8.3f} {kept:8.3f} {default / kept:6.2f}")
    return figures


def measure(default_allocator: bool, steps: int) -> dict[str, float]:
    """Median seconds of each piece of work, by name."""
    with contextlib.ExitStack() as stack:
        if default_allocator:
            stack.enter_context(mock.patch("taming_dist.engine.world.keep_freed_memory"))
        return stage1_steps(steps) | encoding(steps)


def encoding(steps: int) -> dict[str, float]:
    """Encoding by the f16 model with 1,024 codes."""
    from taming_dist.models.quantizers import VectorQuantizerConfig
    from taming_dist.models.vqgan import VQGAN, VQGANConfig

    model = VQGAN(VQGANConfig(VectorQuantizerConfig(codes=1024, dim=256))).eval()
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    seconds = []
    with torch.no_grad():
        for _ in range(steps + 1):
            start = time.perf_counter()
            model.encode(images)
            seconds.append(time.perf_counter() - start)
    return {"encode 2 images at 256 px, f16": statistics.median(seconds[1:])}


def stage1_steps(steps: int) -> dict[str, float]:
    """The demo's step before and after the GAN counts, with random LPIPS weights (same work)."""
    from taming_dist.engine.settings import EngineConfig
    from taming_dist.engine.start import init_world, shutdown
    from taming_dist.launch import environment_place
    from taming_dist.losses.terms import L1Config, PerceptualConfig
    from taming_dist.models.quantizers import EMAQuantizerConfig
    from taming_dist.models.vqgan import VQGANConfig
    from taming_dist.stages.context import Context
    from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
    from taming_dist.training.clock import Clock
    from taming_dist.training.optimization import OptimConfig

    world = init_world(environment_place())
    model = VQGANConfig(
        EMAQuantizerConfig(codes=512, dim=8), SIZE, channels=32, multipliers=[1, 2, 2], blocks=1,
        attention_resolutions=[], latent_channels=64,
    )  # fmt: skip
    terms = {"l1": L1Config(), "perceptual": PerceptualConfig(weights="random")}
    loss = VQGANLossConfig(terms, disc_start=steps + 2)
    context = Context(OptimConfig(lr=1e-3), EngineConfig(), world, BATCH)
    recipe = VQGANRecipe(model, loss, context)
    clock = Clock(BATCH, 10 * steps)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = SimpleNamespace(columns={"image": images})
    seconds: list[float] = []
    for _ in range(2 * (steps + 2)):
        start = time.perf_counter()
        for _ in recipe.train_step([batch], clock):
            pass
        seconds.append(time.perf_counter() - start)
        clock.tick()
    shutdown()
    before, after = seconds[2 : steps + 2], seconds[steps + 4 :]
    return {
        "step of 16 images at 32 px, before the GAN": statistics.median(before),
        "step of 16 images at 32 px, with the GAN": statistics.median(after),
    }
