"""One rank of test_ema.py: keeps an average under every ZeRO stage and says how far off it is.

Run as `python ema_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from small_stage import work

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.models.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.training.optimization import OptimConfig

BATCH, STEPS, HALF_LIFE = 4, 6, 16
SIZES = TransformerConfig(vocabulary=8, grid=[2, 3], layers=1, heads=2, width=8)


def build(world: World, zero: int, accumulation: int) -> Engine:
    torch.manual_seed(0)
    network = Transformer(SIZES)
    optim = OptimConfig(name="adamw", lr=0, weight_decay=0.1)
    micro_batch = BATCH // (world.world_size * accumulation)
    engine = EngineConfig(zero=zero, persist_below=0)
    groups = decay_groups(network, optim.weight_decay)
    return Engine(network, groups, optim, engine, world, micro_batch, accumulation, HALF_LIFE)


def train_step(engine: Engine, world: World, step: int, accumulation: int) -> None:
    tokens = torch.randint(8, (BATCH, 6), generator=torch.Generator().manual_seed(step))
    engine.set_lr(0.01)
    for part in tokens.chunk(accumulation):
        mine = part[world.rank :: world.world_size]
        logits = engine(mine, torch.zeros(len(mine), 1, dtype=torch.int64))
        engine.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine.flatten()))
        engine.step()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The trained weights as they are, whole, on every rank."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with engine._gathered(parameter):
            found[name] = parameter.detach().clone()
    return found


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def check(world: World, zero: int, accumulation: int, folder: Path) -> dict[str, float]:
    """Largest differences: from a slow average of whole weights, and of what must not change."""
    engine = build(world, zero, accumulation)
    slow = weights(engine)
    for step in range(STEPS):
        train_step(engine, world, step, accumulation)
        decay = min(0.5 ** (BATCH / HALF_LIFE), (step + 1) / (step + 11))
        slow = {name: decay * slow[name] + (1 - decay) * w for name, w in weights(engine).items()}
    before = weights(engine)
    with engine.evaluated() as network:
        used = largest_difference(slow, dict(network.named_parameters()))
    exported = engine.full_state()
    engine.save(folder, "network")
    world.barrier()
    other = build(world, zero, accumulation)
    other.load(folder, "network")
    with other.evaluated() as network:
        loaded = largest_difference(slow, dict(network.named_parameters()))
    return {
        "average": used,
        "export": largest_difference(slow, exported) if exported is not None else 0.0,
        "after loading": loaded,
        "trained weights moved by looking": largest_difference(before, weights(engine)),
        "average differs from the weights": largest_difference(slow, before),
    }


def runs(world: World) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as made:
        shared = Path(world.broadcast(made))
        for zero in range(4):
            for accumulation in (1, 2):
                folder = shared / f"{zero}-{accumulation}"
                results[f"zero{zero} x{accumulation}"] = check(world, zero, accumulation, folder)
        world.barrier()
    return results


if __name__ == "__main__":
    work(runs)
