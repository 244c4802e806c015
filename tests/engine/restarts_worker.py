"""One rank of test_restarts.py: codebooks that are set, restarted and averaged under every stage.

Run as `python restarts_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from small_stage import Lines, codebook_digest, load, save, small_recipe, train, work
from torch import Tensor, nn

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.models.quantizers import (
    BSQuantizerConfig,
    EMAQuantizerConfig,
    FSQuantizerConfig,
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    LFQuantizerConfig,
    MultiScaleConfig,
    ProductQuantizerConfig,
    ResidualQuantizerConfig,
    SimVQConfig,
    VectorQuantizerConfig,
)
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, STEPS = 4, 4
RESTARTED = {"codes": 23, "dim": 7, "revive_below": 0.9}  # odd sizes: no stage cuts them evenly
QUANTIZERS = {
    "restarted": VectorQuantizerConfig(**RESTARTED, initial="kmeans", normalized=True),
    "ema": EMAQuantizerConfig(**RESTARTED, decay=0.5),
    "gumbel": GumbelQuantizerConfig(codes=23, dim=7, kl_weight=0.1),
    "fsq": FSQuantizerConfig(levels=[4, 3, 2]),
    "lfq": LFQuantizerConfig(bits=5, temperature=0.5),
    "bsq": BSQuantizerConfig(bits=5, temperature=0.1),
    "ibq": IndexQuantizerConfig(codes=23, dim=7, temperature=0.5),
    "simvq": SimVQConfig(codes=23, dim=7, gradient="rotation"),
    "multiscale": MultiScaleConfig(**RESTARTED, scales=[1, 3, 8], initial="data"),
    "product": ProductQuantizerConfig(codes=21, dim=9, tables=3, initial="data", revive_below=0.9),
    "residual": ResidualQuantizerConfig(codes=23, dim=7, depth=3, decay=0.5, revive_below=0.9),
}
TABLELESS = ("fsq", "lfq", "bsq")
RESUMED = (1, 3)


def build(world: World, zero: int, quantizer: str) -> VQGANRecipe:
    engine = EngineConfig(zero=zero, persist_below=0)
    context = Context(OptimConfig(lr=1e-4), engine, world, GLOBAL_BATCH // world.world_size)
    return small_recipe(QUANTIZERS[quantizer], context, discriminator=None)


def run_and_resume(world: World, zero: int) -> tuple[dict[str, Any], Lines]:
    """A run that is saved after its second step and goes on; and the same from what was saved."""
    recipe = build(world, zero, "restarted")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(world.broadcast(made))
        lines = train(recipe, range(2), STEPS)
        save(recipe, folder)
        lines += train(recipe, range(2, STEPS), STEPS)
        resumed = train(load(build(world, zero, "restarted"), folder), range(2, STEPS), STEPS)
        world.barrier()
    return {"lines": lines, "codebook": codebook_digest(recipe)}, resumed


class Table(nn.Module):
    """Rows that are all used by every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3)  # so that the table does not start where a share does
        self.weight = nn.Parameter(torch.ones(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.before(x) @ self.weight.T


def replaced(world: World, zero: int, half_life: int) -> list[Any]:
    """A table whose rows 1 and 4 are replaced after a step, before and after one more step with a
    gradient of zero, which moves only what has moments. `half_life` is that of the average of the
    weights, which is then what is looked at."""
    optim, config = OptimConfig(lr=0.1), EngineConfig(zero=zero, persist_below=0)
    torch.manual_seed(0)
    table = build_network(Table, config, world)
    groups = [{"params": list(table.parameters())}]
    engine = Engine(table, groups, optim, config, world, 2, 1, half_life)
    engine.set_lr(0.1)
    x = torch.ones(2, 3)
    engine.backward(engine(x).square().mean())
    engine.step()
    rows = torch.tensor([False, True, False, False, True])
    engine.replace_rows(engine.module.weight, rows, torch.full((5, 3), 7.0))
    states = [engine.full_state()]
    engine.backward(0.0 * engine(x).sum())
    engine.step()
    states.append(engine.full_state())
    return [state["weight"].tolist() for state in states if state]


def runs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for zero in range(4):
        found[f"zero{zero} replaced"] = replaced(world, zero, 0)
        found[f"zero{zero} averaged"] = replaced(world, zero, 1000)
        for quantizer in QUANTIZERS:
            recipe = build(world, zero, quantizer)
            torch.manual_seed(world.rank)  # of gumbel's noise
            lines = train(recipe, range(STEPS), STEPS)
            digest = "" if quantizer in TABLELESS else codebook_digest(recipe)
            found[f"zero{zero} {quantizer}"] = {"lines": lines, "codebook": digest}
    for zero in RESUMED:
        whole, resumed = run_and_resume(world, zero)
        found |= {f"zero{zero} saved": whole, f"zero{zero} resumed": resumed}
    return found


if __name__ == "__main__":
    work(runs)
