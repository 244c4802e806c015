"""One rank of test_priors.py: stage 2 of every kind, however ZeRO cuts and places it.

Run as `python priors_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from equality_worker import GLOBAL_BATCH
from small_prior import code_batches
from small_stage import load, norms_of, save, train, work

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.models.prior import head
from taming_dist.models.prior.blocks import GPTBlockConfig, LlamaBlockConfig, RARBlockConfig
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.schemes import NextIndex, NextScale
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.optimization import OptimConfig

STEPS, ACCUMULATION = 4, 2
OPTIM = OptimConfig(lr=1e-3, name="adamw", weight_decay=0.1, clip=0.05, ema_half_life=GLOBAL_BATCH)
NOISY = {"grid": [3, 4], "scheme": NextIndex(pkeep=0.8)}
KINDS: dict[str, dict[str, Any]] = {
    "gpt": {**NOISY, "block": GPTBlockConfig(unmasked=1)},
    "llama": {**NOISY, "block": LlamaBlockConfig(adaptive=True)},
    "rar": {**NOISY, "block": RARBlockConfig()},
    "next_scale": {"grid": [14], "scheme": NextScale([1, 2, 3]), "block": RARBlockConfig()},
}


def build(world: World, kind: str, **settings: Any) -> TransformerRecipe:
    model = TransformerConfig(
        vocabulary=24,
        layers=2,
        heads=2,
        width=16,
        condition=ClassCondition(3),
        condition_table="own",
        null_prefix=True,
        **KINDS[kind],
    )
    engine = EngineConfig(persist_below=0, **settings)
    micro_batch = GLOBAL_BATCH // (world.world_size * ACCUMULATION)
    context = Context(OPTIM, engine, world, micro_batch, ACCUMULATION)
    return TransformerRecipe(model, TokenLossConfig(condition_dropout=0.5), context)


def run(world: World, kind: str, **settings: Any) -> dict[str, Any]:
    """Losses, and norms of the averaged weights; half of them from a run that was resumed."""
    recipe = build(world, kind, **settings)
    lines = train(recipe, range(STEPS // 2), STEPS, code_batches)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(world.broadcast(made))
        save(recipe, folder)
        recipe = load(build(world, kind, **settings), folder)
        world.barrier()
    lines += train(recipe, range(STEPS // 2, STEPS), STEPS, code_batches)
    return {"lines": lines, "norms": norms_of(recipe.transformer)}


def runs(world: World) -> dict[str, Any]:
    head.LARGE_VOCABULARY, head.LOGITS = 24, 24 * 5  # no logits are kept
    found = {f"{kind} plain": run(world, kind) for kind in KINDS}
    found["llama recomputed"] = run(world, "llama", recompute=True, zero=2)
    for zero, kind in ((1, "gpt"), (3, "llama"), (2, "next_scale"), (3, "next_scale")):
        found[f"{kind} zero{zero}"] = run(world, kind, zero=zero)
    for zero, kind in ((1, "rar"), (2, "llama"), (3, "gpt")):
        found[f"{kind} zero{zero} offload"] = run(world, kind, zero=zero, offload="optimizer")
    with torch.compiler.set_stance("default", force_backend="eager"):  # what torch can follow
        for zero, kind in ((1, "llama"), (3, "rar"), (1, "next_scale")):
            found[f"{kind} zero{zero} compiled"] = run(world, kind, zero=zero, compile=True)
    return found


if __name__ == "__main__":
    work(runs)
