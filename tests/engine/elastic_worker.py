"""One rank of test_elastic.py: saves small stages, then resumes what other ranks and stages saved.

Run as `python elastic_worker.py OUT one two four` with torchrun's variables and the names of all
worlds that run, of which OUT's is its own; writes OUT-<rank>.json. The worlds run at the same time,
and read each other's checkpoints once all are there.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_prior import code_batches, small_prior
from small_stage import image_batches, load, save, small_recipe, train, work

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.joined import stored_parameters
from taming_dist.models.quantizers import EMAQuantizerConfig
from taming_dist.stages.context import Context
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, SAVED, STEPS = 8, 3, 6
PATIENCE_S = 400
BATCHES = {"prior": code_batches, "vqgan": image_batches, "decoder": image_batches}


def build(world: World, kind: str, zero: int, decay: float = 0.1) -> Any:
    optim = OptimConfig(lr=1e-3, name="adamw", weight_decay=decay, clip=0.5, ema_half_life=20)
    engine = EngineConfig(zero=zero, persist_below=0)
    freeze = ["encoder", "quantizer"] if kind == "decoder" else []
    micro_batch = GLOBAL_BATCH // world.world_size
    context = Context(optim, engine, world, micro_batch, 1, freeze=freeze)
    if kind == "prior":
        return small_prior("gpt", context)  # of which some tensors are stored in parts
    return small_recipe(
        EMAQuantizerConfig(codes=24, dim=8, decay=0.8, revive_below=0.3),
        context,
        adaptive="lagged",
        disc_start=1,
        discriminator=PatchGANConfig(channels=8, layers=2),
    )


def write(recipe: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save(recipe, folder)
    if recipe.world.is_first:
        (folder / "recipe.json").write_text(json.dumps(recipe.state_dict()))


def resume(recipe: Any, folder: Path, batches: Callable[[Any, int], Iterator[Any]]) -> Any:
    recipe.load_state_dict(json.loads((folder / "recipe.json").read_text()))
    return train(recipe, range(SAVED, STEPS), STEPS, batches)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the engines in a checkpoint, flat and whole, read the slow way."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("*/*.safetensors"):
        for key, values in load_file(path).items():
            name, _, first = key.rpartition("@")
            pieces.setdefault(f"{path.parent.name}/{name}", []).append((int(first), values))
    found = {}
    for name, parts in pieces.items():
        found[name] = torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
    return found


def is_same_again(recipe: Any, source: Path, folder: Path) -> bool:
    """Whether what was loaded from a checkpoint, saved once more, is the same to the bit."""
    write(recipe, folder)
    if not recipe.world.is_first:
        return True
    before, after = whole(source), whole(folder)
    scalars = [json.loads(path.read_text()) for path in sorted(source.glob("*/state.json"))]
    again = [json.loads(path.read_text()) for path in sorted(folder.glob("*/state.json"))]
    kinds = {name.split("/")[1] for name in before}
    for name, engine in recipe.engines.items():
        kept = {part.name for part in stored_parameters(engine.module)}
        assert {f"{name}/weights/{part}" for part in kept} <= before.keys()
    assert kinds >= {"weights", "exp_avg", "exp_avg_sq", "average"}, kinds
    return (
        before.keys() == after.keys()
        and all(torch.equal(before[name], after[name]) for name in before)
        and scalars == again
    )


def groups_of(recipe: Any, lr: float) -> list[list[float]]:
    """Learning rate and weight decay of each group of the first engine."""
    engine = next(iter(recipe.engines.values()))
    engine.set_lr(lr)
    return [[g["lr"], g["weight_decay"]] for g in engine._engine.optimizer.param_groups]


def sources(kind: str, zero: int, worlds: list[str]) -> list[str]:
    """Whose checkpoints a stage reads: its own on all numbers of ranks, and another's."""
    stages = [zero, (zero + 1) % 4] if kind == "prior" else [(zero + 2) % 4]
    return [f"{kind}-{world}-{stage}" for world in worlds for stage in stages]


def runs(world: World) -> dict[str, Any]:
    out = Path(sys.argv[1])
    shared, own, worlds = out.parent, out.name, sys.argv[2:]
    found: dict[str, Any] = {}
    for kind, batches in BATCHES.items():
        for zero in range(4):
            name = f"{kind}-{own}-{zero}"
            recipe = build(world, kind, zero)
            lines = train(recipe, range(SAVED), STEPS, batches)
            write(recipe, shared / name)
            found[name] = lines + train(recipe, range(SAVED, STEPS), STEPS, batches)
    world.barrier()
    (shared / f"{own}-{world.rank}.saved").touch()
    end = time.monotonic() + PATIENCE_S
    while any(not (shared / f"{name}-0.saved").exists() for name in worlds):
        assert time.monotonic() < end, "a world is missing"
        time.sleep(0.2)
    for kind, batches in BATCHES.items():
        for zero in range(4):
            for source in sources(kind, zero, worlds):
                recipe, name = build(world, kind, zero), f"{source} at {own}-{zero}"
                load(recipe, shared / source)
                found[f"same {name}"] = is_same_again(recipe, shared / source, shared / name)
                found[name] = resume(recipe, shared / source, batches)
            other = load(build(world, kind, zero, decay=0.3), shared / source)
            found[f"groups of {kind} at {own}-{zero}"] = groups_of(other, lr=0.25)
    return found


if __name__ == "__main__":
    work(runs)
