"""Training at tiny size on the device that this process sees, one cell after the other.

Run as `python worker.py OUT CELL...` with torchrun's variables for more than one rank. Each cell's
line of JSON goes to OUT-<rank>.jsonl as soon as it is there. A cell that fails leaves its traceback
there; one that takes longer than LIMIT_S ends the process, with the stacks of all threads.
"""

import faulthandler
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cell
from safetensors.torch import save_file
from small_prior import code_batches, small_prior
from small_stage import image_batches, small_recipe, train
from waits import Copies, no_waiting

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.world import World
from taming_dist.launch import environment_place
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TransformerRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, ACCUMULATION, STEPS, WARM_UP = 8, 2, 4, 3
LIMIT_S = 150


def build(world: World, cell: Cell) -> Any:
    micro_batch = GLOBAL_BATCH // (ACCUMULATION * world.world_size)
    how = {} if cell.how == "eager" else {cell.how: True}
    engine = EngineConfig(zero=cell.zero, precision=cell.precision, persist_below=0, **how)
    cut = (engine, world, micro_batch, ACCUMULATION)
    if cell.stage != "vqgan":
        optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.01, clip=1.0)
        return small_prior(cell.stage, Context(optim, *cut), width=32)
    context = Context(OptimConfig(lr=1e-4, clip=0.5, ema_half_life=100), *cut)
    loss: dict[str, Any] = {"perceptual": 0.1, "disc_start": 1, "adaptive": "lagged"}
    if cell.look == "steady":  # all that a step can do
        quantizer: Any = EMAQuantizerConfig(codes=24, dim=8, decay=0.8, revive_below=0.3)
        loss |= {"augment": ["color", "translation", "cutout"], "lecam_weight": 0.1}
        norm = "batch"
    else:  # what depends on rounding as little as it can
        quantizer, norm = VectorQuantizerConfig(codes=24, dim=8), "group"
    loss["discriminator"] = PatchGANConfig(channels=8, layers=2, norm=norm)
    return small_recipe(quantizer, context, size=32, levels=3, **loss)


def batches(recipe: Any, step: int) -> Iterator[Any]:
    """This rank's micro-batches of a step, in the CPU's memory."""
    of_codes = isinstance(recipe, TransformerRecipe)
    return code_batches(recipe, step) if of_codes else image_batches(recipe, step)


def run_train(world: World, cell: Cell, out: str) -> dict[str, Any]:
    """The figures of a few steps; the weights before and after them go to files."""
    recipe = build(world, cell)
    for when in ("before", "after"):
        if when == "after":
            lines = train(recipe, range(STEPS), STEPS, batches)
        weights = {
            f"{name}.{key}": value
            for name, engine in recipe.engines.items()
            for key, value in (engine.full_state() or {}).items()
        }
        if world.is_first:
            save_file(weights, f"{out}-{cell.name}-{when}.safetensors")
    return {"lines": lines}


def run_steady(world: World, cell: Cell) -> dict[str, Any]:
    """A step in which waiting raises, and one of which the copies are counted."""
    recipe, means = build(world, cell), Means()
    moved = torch.ones((), dtype=torch.bool, device=world.device)

    def step(number: int) -> None:
        given = list(batches(recipe, number))
        clock = Clock(GLOBAL_BATCH, 100, images=number * GLOBAL_BATCH)
        means.add_all(list(recipe.train_step(given, clock)), moved)

    for number in range(WARM_UP):
        step(number)
    with no_waiting(world.device):
        step(WARM_UP)
    with Copies() as copies:
        step(WARM_UP + 1)
    return {"copies": copies.found, "metrics": sorted(means.take(world))}


def run(world: World, cell: Cell, out: str) -> dict[str, Any]:
    """What a cell gives, or the error that it ends with."""
    start = time.monotonic()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    try:
        found = run_steady(world, cell) if cell.look == "steady" else run_train(world, cell, out)
    except Exception:
        found = {"error": traceback.format_exc()}
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    return found | {"cell": cell.name, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    out, *cells = sys.argv[1:]
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    world = init_world(environment_place())
    with open(Path(f"{out}-{world.rank}.jsonl"), "a") as file:
        for name in cells:
            line = run(world, Cell.parse(name), out)
            file.write(json.dumps(line | {"device": world.device.type}) + "\n")
            file.flush()
    shutdown()


if __name__ == "__main__":
    main()
