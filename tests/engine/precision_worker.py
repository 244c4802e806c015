"""One rank of test_precision.py: half precision, and gradients that are not finite.

Run as `python precision_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matrix_worker import DISC_START, build
from small_stage import codebook_digest, digest, train, work
from torch import Tensor, nn

from taming_dist.engine import spikes
from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.metrics import read
from taming_dist.training.optimization import OptimConfig

ACCUMULATION, CLIP, LEARNING_RATE = 2, 0.05, 0.01
INFINITE = float("inf")
SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda loss: loss,
    "gradient": lambda loss: loss * INFINITE,
    "loss": lambda loss: loss + INFINITE,
    "spike": lambda loss: loss * 60,
}
TRAINED = [("fp32", 0), ("fp16", 0), ("fp16", 2)]  # bf16 is in matrix_worker.py


class Net(nn.Module):
    """Layers that autocast takes to half precision, around one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def small_engine(world: World, precision: str, zero: int, skip_spikes: float = 0.0) -> Engine:
    config = EngineConfig(zero=zero, precision=precision, persist_below=0)
    torch.manual_seed(0)
    net = build_network(Net, config, world)
    return Engine(
        net,
        [{"params": list(net.parameters())}],
        OptimConfig(lr=LEARNING_RATE, clip=CLIP),
        config,
        world,
        micro_batch=2,
        accumulation=ACCUMULATION,
        ema_half_life=100,
        skip_spikes=skip_spikes,
    )


def small_step(engine: Engine, world: World, step: int, spoilt: str = "") -> None:
    """One optimizer step. `spoilt`: in one micro-batch of one rank the gradient is infinite, or the
    loss is and its gradient is not."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    engine.set_lr(LEARNING_RATE)
    for index, part in enumerate(images.chunk(ACCUMULATION)):
        mine = part[world.rank :: world.world_size]
        loss = engine(mine).float().square().mean()
        if index == 0 and world.rank == world.world_size - 1:
            loss = SPOIL[spoilt](loss)
        engine.backward(loss)
        engine.step()


def held(engine: Engine) -> str:
    """sha256 of everything that an optimizer step moves."""
    tensors = [*engine.masters(), *(engine._average.shards if engine._average else [])]
    optimizer = engine._engine.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        tensors += [state[name] for name in ("exp_avg", "exp_avg_sq")]
    return digest(tensors)


def spiked_run(world: World, precision: str, zero: int, folder: Path) -> dict[str, Any]:
    """As many steps as spikes are judged by, one on one rank, and one from a checkpoint and not."""
    spikes.WINDOW = 4
    engine = small_engine(world, precision, zero, skip_spikes=3.0)
    for step in range(3 * spikes.WINDOW):  # norms fall fast at first
        small_step(engine, world, step)
    before, scale = held(engine), float(engine.loss_scale)
    small_step(engine, world, 99, "spike")
    found = {"unmoved": held(engine) == before, "scales": [scale, float(engine.loss_scale)]}
    found |= {"spiked": [bool(engine.spiked)], "moved": [bool(engine.moved)]}
    engine.snapshot().write(folder / "net")
    world.barrier()
    fresh = small_engine(world, precision, zero, skip_spikes=3.0)
    fresh.load(folder, "net")
    for either in (engine, fresh):
        small_step(either, world, 12)
    found["moved"].append(bool(engine.moved))
    states = [either._spikes.state_dict() for either in (engine, fresh)]
    weights = [final_weights(either) for either in (engine, fresh)]
    return found | {"resumed alike": states[0] == states[1] and weights[0] == weights[1]}


def final_weights(engine: Engine) -> list[float]:
    """All weights, or their average, in one list; empty but on the first rank."""
    state = engine.full_state() or {}
    return [number for value in state.values() for number in value.flatten().tolist()]


def spoilt_run(world: World, precision: str, zero: int, folder: Path) -> dict[str, Any]:
    """Two steps, two spoilt ones, two more; and the same without the spoilt ones."""
    engine = small_engine(world, precision, zero)
    for step in (0, 1):
        small_step(engine, world, step)
    before, scale = held(engine), float(engine.loss_scale)
    good = read(engine.window_metrics())
    for spoilt in ("gradient", "loss"):
        small_step(engine, world, 9, spoilt)
    bad = read(engine.window_metrics())
    found = {"unmoved": held(engine) == before, "scales": [scale, float(engine.loss_scale)]}
    found |= {"moved": [bool(engine.moved)], "skipped": bad["skipped_steps"]}
    for step in (2, 3):
        small_step(engine, world, step)
    found["moved"].append(bool(engine.moved))
    engine.snapshot().write(folder / "net")
    world.barrier()
    fresh = small_engine(world, precision, zero)
    fresh.load(folder, "net")
    other = small_engine(world, precision, zero)
    for step in range(4):
        small_step(other, world, step)
    return found | {
        "norms": [good["gradient_norm"], bad["gradient_norm"]],
        "weights": final_weights(engine),
        "weights without": final_weights(other),
        "loaded scale": float(fresh.loss_scale),
    }


def vanishing(world: World, zero: int) -> list[float]:
    """Norm of a gradient at the input: in fp16 as the engine takes it and plainly, and in fp32."""
    engine = small_engine(world, "fp16", zero)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)

    def loss(half: bool) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=half):
            return 1e-6 * engine.module(x).float().mean()

    gradients = engine.gradients_at(loss(True), x)
    gradients += [torch.autograd.grad(loss(half), x)[0] for half in (True, False)]
    return [float(gradient.norm()) for gradient in gradients]


def overflowing(world: World) -> dict[str, Any]:
    """Stage 1 in fp16 from a scale that is too large: its figures until it has found its way."""
    recipe: VQGANRecipe = build(world, "fp16", "vector", 2, 1)
    recipe.generator._scale.load_state_dict({"value": 2.0**22, "calm": 0})
    lines = train(recipe, range(6), 6)
    return {"lines": lines, "scale": float(recipe.generator.loss_scale)}


def remembered(recipe: VQGANRecipe) -> str:
    """sha256 of all that a step of stage 1 moves on this rank, but for BatchNorm's statistics: they
    follow the other micro-batches."""
    weights = held(recipe.generator) + held(recipe.adversary.engine)
    return codebook_digest(recipe) + weights + json.dumps(recipe.state_dict())


def poisoned(world: World, zero: int) -> dict[str, Any]:
    """Stage 1 with all that follows the batches, and in one step an encoder that gives one latent
    that is not finite, in one micro-batch of one rank."""
    norm = PatchGANConfig(channels=8, layers=2, norm="batch")
    recipe = build(world, "fp32", "ema", zero, 2, lecam_weight=0.1, discriminator=norm)
    lines = train(recipe, range(3), 5)
    before = remembered(recipe)
    bad = world.rank == world.world_size - 1
    calls: list[int] = []

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        if bad and len(calls) == 2:
            output = output.clone()
            output[0, 0, 0, 0] = float("nan")
        return output

    hook = recipe.generator.module.quant_conv.register_forward_hook(spoil)
    lines += train(recipe, range(3, 4), 5)
    hook.remove()
    unmoved = remembered(recipe) == before
    lines += train(recipe, range(4, 5), 5)
    buffers = [tensor.isfinite().all() for tensor in recipe.adversary.engine.module.buffers()]
    return {
        "lines": lines,
        "unmoved": unmoved,
        "moved again": remembered(recipe) != before,
        "statistics finite": bool(torch.stack(buffers).all()) and len(buffers) > 0,
    }


def runs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        shared = Path(world.broadcast(made))
        for precision in ("fp32", "fp16"):
            for zero in range(4):
                key = f"{precision} zero{zero}"
                found[key] = spoilt_run(world, precision, zero, shared / key.replace(" ", "-"))
                spiked = shared / f"{precision}-{zero}-spiked"
                found[f"{key} spiked"] = spiked_run(world, precision, zero, spiked)
        world.barrier()
    found["vanishing"] = vanishing(world, 0)
    for precision, zero in TRAINED:
        recipe = build(world, precision, "vector", zero, 1)
        lines = train(recipe, range(DISC_START + 2), DISC_START + 2)
        found[f"{precision} zero{zero} vqgan"] = lines
    found["overflowing"] = overflowing(world)
    for zero in (0, 2):
        found[f"poisoned zero{zero}"] = poisoned(world, zero)
    return found


if __name__ == "__main__":
    work(runs)
