"""One rank of test_matrix.py: the same training, however it is cut.

Run as `python matrix_worker.py OUT part|whole` with torchrun's variables. Writes the losses and the
codebooks' digests to OUT-<rank>.json; the first rank writes the weights before and after training
to OUT-<cell>-before.safetensors and -after.safetensors.
"""

import itertools
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from small_stage import codebook_digest, small_recipe, train, work

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, STEPS, LONG = 8, 4, 20
DISC_START = 1  # lagged, the GAN's weight is 0 in its first step
CLIP = 0.5  # below the norm of either network's gradient
QUANTIZERS = {
    "vector": VectorQuantizerConfig(codes=24, dim=8),
    "ema": EMAQuantizerConfig(codes=24, dim=8, decay=0.8, revive_below=0.3),
    "restarted": VectorQuantizerConfig(codes=24, dim=8, revive_below=0.9),
}
WHOLE = list(itertools.product(("fp32", "bf16"), ("vector", "ema"), range(4), (1, 2)))
PART = [("fp32", "vector", 0, 1), ("fp32", "vector", 3, 2), ("bf16", "vector", 2, 1)]


def build(
    world: World, precision: str, quantizer: str, zero: int, accumulation: int, **loss: Any
) -> VQGANRecipe:
    defaults = {
        "l1": 1.0,
        "l2": 0.0,
        "perceptual": 0.1,  # of random weights, which blow rounding up
        "disc_start": DISC_START,
        "discriminator": PatchGANConfig(channels=8, layers=2, norm="group"),
        "adaptive": "lagged",
    }
    engine = EngineConfig(zero=zero, precision=precision, persist_below=0)
    micro_batch = GLOBAL_BATCH // (world.world_size * accumulation)
    context = Context(OptimConfig(lr=1e-4, clip=CLIP), engine, world, micro_batch, accumulation)
    return small_recipe(QUANTIZERS[quantizer], context, size=32, levels=3, **defaults | loss)


def run_cell(world: World, cell: tuple[str, str, int, int], out: str) -> dict[str, Any]:
    precision, quantizer, zero, accumulation = cell
    recipe = build(world, precision, quantizer, zero, accumulation)
    before = weights_of(recipe)
    lines = train(recipe, range(STEPS), STEPS)
    after = weights_of(recipe)
    if world.is_first:
        save_file(before, f"{out}-{name_of(cell)}-before.safetensors")
        save_file(after, f"{out}-{name_of(cell)}-after.safetensors")
    return {"lines": lines, "codebook": codebook_digest(recipe)}


def weights_of(recipe: VQGANRecipe) -> dict[str, torch.Tensor]:
    """Both networks, whole; empty but on the first rank."""
    whole = {}
    for name, engine in recipe.engines.items():
        whole |= {f"{name}.{key}": value for key, value in (engine.full_state() or {}).items()}
    return whole


def name_of(cell: tuple[str, str, int, int]) -> str:
    precision, quantizer, zero, accumulation = cell
    return f"{precision} {quantizer} zero{zero} x{accumulation}"


def run_long(world: World, quantizer: str, zero: int) -> dict[str, Any]:
    """Codebooks that have lived through many restarts, without a GAN."""
    recipe = build(world, "fp32", quantizer, zero, 1, discriminator=None)
    lines = train(recipe, range(LONG), LONG)
    restarted = [line["codebook_revived"] for line in lines]
    return {"restarted": restarted, "codebook": codebook_digest(recipe)}


def runs(world: World) -> dict[str, Any]:
    out, part = sys.argv[1:]
    cells = WHOLE if part == "whole" else PART
    found = {name_of(cell): run_cell(world, cell, out) for cell in cells}
    if part == "whole" and world.world_size > 1:
        for quantizer, zero in itertools.product(("restarted", "ema"), (0, 3)):
            found[f"long {quantizer} zero{zero}"] = run_long(world, quantizer, zero)
    return found


if __name__ == "__main__":
    work(runs)
