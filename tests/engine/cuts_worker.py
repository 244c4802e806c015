"""One rank of test_cuts.py: trains every kind of stage 2, saves, resumes and samples it.

Run as `python cuts_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import itertools
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from average_worker import weights
from small_prior import KINDS, code_batches, small_prior
from small_stage import load, norms_of, save, train, work

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.generation.generator import generate_codes
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.transformer import Transformer
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TransformerRecipe
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, SAVED, STEPS = 8, 3, 5


def build(
    world: World, kind: str, zero: int, accumulation: int, decay: float = 0.1
) -> TransformerRecipe:
    optim = OptimConfig(lr=1e-3, name="adamw", weight_decay=decay, clip=0.5, ema_half_life=20)
    engine = EngineConfig(zero=zero, persist_below=0)
    micro_batch = GLOBAL_BATCH // (world.world_size * accumulation)
    return small_prior(kind, Context(optim, engine, world, micro_batch, accumulation))


def groups_of(recipe: TransformerRecipe) -> list[list[float]]:
    """Learning rate and weight decay of each group."""
    groups = recipe.transformer._engine.optimizer.param_groups
    return [[group["lr"], group["weight_decay"]] for group in groups]


@torch.no_grad()
def samples_as_a_plain_network(recipe: TransformerRecipe) -> bool:
    """Whether guided samples of the averaged weights, cut up as they are, are those of a network
    that has them whole."""
    (batch, *_) = code_batches(recipe, 0)
    prefix = recipe.network.condition.prefix(len(batch), batch.columns)
    scale = 2.0 if recipe.network.config.null_prefix else 1.0
    plain = Transformer(recipe.network.config).eval()
    found = []
    with recipe.transformer.evaluated() as network:
        plain.load_state_dict(weights(recipe.transformer))
        for one, whole in ((network, recipe.transformer.root_weights()), (plain, nullcontext())):
            with whole:
                found.append(
                    generate_codes(one, prefix, Sampling(guidance=scale), 0, range(len(batch)))
                )
    return torch.equal(*found)


def run(world: World, kind: str, zero: int, accumulation: int, folder: Path) -> dict[str, Any]:
    """A run that is saved on its way and goes on; the same from there on in fresh engines, which
    are those of a run with another weight decay for a while."""
    recipe = build(world, kind, zero, accumulation)
    lines = train(recipe, range(SAVED), STEPS, code_batches)
    save(recipe, folder)
    lines += train(recipe, range(SAVED, STEPS), STEPS, code_batches)
    found: dict[str, Any] = {"lines": lines, "norms": norms_of(recipe.transformer)}
    found["samples"] = samples_as_a_plain_network(recipe)
    if accumulation == 1:
        other = load(build(world, kind, zero, accumulation, decay=0.3), folder)
        other.transformer.set_lr(0.25)
        found["groups"] = groups_of(other)
        fresh = load(build(world, kind, zero, accumulation), folder)
        found["resumed"] = train(fresh, range(SAVED, STEPS), STEPS, code_batches)
    return found


def runs(world: World) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as made:
        shared = Path(world.broadcast(made))
        for kind, zero, accumulation in itertools.product(KINDS, range(4), (1, 2)):
            name = f"{kind} zero{zero} x{accumulation}"
            found[name] = run(world, kind, zero, accumulation, shared / name)
        world.barrier()
    return found


if __name__ == "__main__":
    work(runs)
