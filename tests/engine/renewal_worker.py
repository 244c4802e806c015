"""One rank of test_renewal.py: codebooks that are set, revived and averaged under every ZeRO stage.

Run as `python renewal_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from equality_worker import codebook_digest, micro_batches
from torch import Tensor, nn

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World, environment_place
from taming_dist.engine.zero import Engine, init_world, shutdown
from taming_dist.models.quantizers import (
    IndexQuantizerConfig,
    LFQuantizerConfig,
    VectorQuantizerConfig,
)
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.recipes.setup import Setup
from taming_dist.recipes.vqgan import VQGANLossConfig, VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, STEPS = 4, 4
RENEWED = {"codes": 23, "dim": 7, "revive_below": 0.9}  # odd sizes: no stage cuts them evenly
QUANTIZERS = {
    "renewed": VectorQuantizerConfig(**RENEWED, initial="kmeans", normalized=True),
    "lfq": LFQuantizerConfig(bits=5, temperature=0.5),
    "ibq": IndexQuantizerConfig(codes=23, dim=7, temperature=0.5),
}
RUNS = {0: ["renewed", "lfq", "ibq"], 1: ["renewed"], 2: ["renewed"], 3: ["renewed", "ibq"]}


def build(world: World, zero: int, quantizer: str) -> VQGANRecipe:
    model = VQGANConfig(
        quantizer=QUANTIZERS[quantizer],
        resolution=32,
        channels=32,
        multipliers=[1, 1, 1],
        blocks=1,
        attention_resolutions=[],
        latent_channels=8,
    )
    loss = VQGANLossConfig(
        lpips_net="alex",
        lpips_weights="random",
        discriminator=None,
    )
    engine = EngineConfig(zero=zero, persist_below=0)
    setup = Setup(OptimConfig(lr=1e-4), engine, world, GLOBAL_BATCH // world.world_size)
    return VQGANRecipe(model, loss, setup)


def train(recipe: VQGANRecipe, first: int, last: int) -> list[dict[str, float]]:
    """Scalars of each step, over all ranks, and how many codes were revived."""
    lines = []
    for step in range(first, last):
        clock, means = Clock(GLOBAL_BATCH, STEPS, images=step * GLOBAL_BATCH), Means()
        for scalars in recipe.train_step(micro_batches(recipe.world, step, 1), clock):
            means.add(scalars)
        revived = recipe.window_metrics()["codebook_revived"]
        lines.append(means.take(recipe.world) | {"revived": revived})
    return lines


def resumed(world: World, zero: int, quantizer: str, folder: Path) -> list[dict[str, float]]:
    """The steps after the second, from what was saved after it."""
    saved = build(world, zero, quantizer)
    train(saved, 0, 2)
    saved.generator.save(folder, "generator")
    world.barrier()
    fresh = build(world, zero, quantizer)
    fresh.generator.load(folder, "generator")
    return train(fresh, 2, STEPS)


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
    torch.manual_seed(0)
    table = Table()
    groups = [{"params": list(table.parameters())}]
    optim, config = OptimConfig(lr=0.1), EngineConfig(zero=zero, persist_below=0)
    engine = Engine(table, groups, optim, config, world, 2, 1, half_life)
    engine.set_lr(0.1)
    x = torch.ones(2, 3)
    engine.backward(engine(x).square().mean())
    engine.step()
    rows = torch.tensor([1, 4])
    engine.replace_rows(engine.module.weight, rows, torch.full((2, 3), 7.0))
    states = [engine.full_state()]
    engine.backward(0.0 * engine(x).sum())
    engine.step()
    states.append(engine.full_state())
    return [state["weight"].tolist() for state in states if state]


def main() -> None:
    torch.set_num_threads(1)
    world = init_world(environment_place())
    found: dict[str, Any] = {}
    for zero in range(4):
        found[f"zero{zero} replaced"] = replaced(world, zero, 0)
        found[f"zero{zero} averaged"] = replaced(world, zero, 1000)
        for quantizer in RUNS[zero]:
            recipe = build(world, zero, quantizer)
            lines = train(recipe, 0, STEPS)
            digest = codebook_digest(recipe) if quantizer != "lfq" else ""
            found[f"zero{zero} {quantizer}"] = {"lines": lines, "codebook": digest}
    for zero in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            shared = Path(world.broadcast(folder))
            found[f"zero{zero} resumed"] = resumed(world, zero, "renewed", shared)
            world.barrier()
    Path(f"{sys.argv[1]}-{world.rank}.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
