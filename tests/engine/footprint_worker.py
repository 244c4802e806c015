"""One rank of test_footprint.py: a small prior under every stage of ZeRO, and what it holds of it.

Run as `python footprint_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from small_stage import work

from taming_dist.data.codes import CodeBatch
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import OptimConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks.memory import Held  # noqa: E402

PERSIST_BELOW = 1000  # elements: biases and norms are smaller, tables and matrices are not
MODEL = {"vocabulary": 64, "grid": [4, 4], "layers": 2, "heads": 4, "width": 64}


class Prior:
    """A recipe as `Held` looks at one: without networks of a loss."""

    def __init__(self, recipe: TransformerRecipe) -> None:
        self.engines, self.reconstruction = recipe.engines, torch.nn.Identity()


def held(world: World, zero: int) -> dict[str, float]:
    """Bytes in the middle of the second step, by use."""
    optim = OptimConfig(lr=1e-3, ema_half_life=100)
    engine = EngineConfig(zero=zero, persist_below=PERSIST_BELOW)
    model = TransformerConfig(**MODEL, condition=ClassCondition(3))
    context = Context(optim, engine, world, micro_batch=1, accumulation=2)
    recipe = TransformerRecipe(model, TokenLossConfig(), context)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    batch = CodeBatch({"codes": codes, "cls": torch.tensor([1])}, torch.arange(1))
    clock = Clock(2 * world.world_size, 4, images=0)
    for _ in recipe.train_step([batch, batch], clock):
        pass
    clock.tick()
    half_a_step = recipe.train_step([batch, batch], clock)
    next(half_a_step)
    return Held(Prior(recipe)).by_use()


def runs(world: World) -> dict[str, Any]:
    return {f"zero{zero}": held(world, zero) for zero in range(4)}


if __name__ == "__main__":
    work(runs)
