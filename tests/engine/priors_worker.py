"""One rank of test_priors.py: stage 2 with each kind of block, however ZeRO cuts and places it.

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
from taming_dist.models.prior.schemes import NextIndex
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.optimization import OptimConfig

STEPS, ACCUMULATION = 4, 2
OPTIM = OptimConfig(lr=1e-3, name="adamw", weight_decay=0.1, clip=0.05, ema_half_life=GLOBAL_BATCH)
BLOCKS = {
    "gpt": GPTBlockConfig(unmasked=1),
    "llama": LlamaBlockConfig(adaptive=True),
    "rar": RARBlockConfig(),
}


def build(world: World, block: str, **settings: Any) -> TransformerRecipe:
    model = TransformerConfig(
        vocabulary=24,
        grid=[3, 4],
        layers=2,
        heads=2,
        width=16,
        condition=ClassCondition(3),
        condition_table="own",
        null_prefix=True,
        block=BLOCKS[block],
        scheme=NextIndex(pkeep=0.8),
    )
    engine = EngineConfig(persist_below=0, **settings)
    micro_batch = GLOBAL_BATCH // (world.world_size * ACCUMULATION)
    context = Context(OPTIM, engine, world, micro_batch, ACCUMULATION)
    return TransformerRecipe(model, TokenLossConfig(condition_dropout=0.5), context)


def run(world: World, block: str, **settings: Any) -> dict[str, Any]:
    """Losses, and norms of the averaged weights; half of them from a run that was resumed."""
    recipe = build(world, block, **settings)
    lines = train(recipe, range(STEPS // 2), STEPS, code_batches)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(world.broadcast(made))
        save(recipe, folder)
        recipe = load(build(world, block, **settings), folder)
        world.barrier()
    lines += train(recipe, range(STEPS // 2, STEPS), STEPS, code_batches)
    return {"lines": lines, "norms": norms_of(recipe.transformer)}


def runs(world: World) -> dict[str, Any]:
    head.LARGE_VOCABULARY, head.LOGITS = 24, 24 * 5  # no logits are kept
    found = {f"{block} plain": run(world, block) for block in BLOCKS}
    found["llama recomputed"] = run(world, "llama", recompute=True, zero=2)
    for zero, block in ((1, "gpt"), (3, "llama")):
        found[f"{block} zero{zero}"] = run(world, block, zero=zero)
    for zero, block in ((1, "rar"), (2, "llama"), (3, "gpt")):
        found[f"{block} zero{zero} offload"] = run(world, block, zero=zero, offload="optimizer")
    with torch.compiler.set_stance("default", force_backend="eager"):  # what torch can follow
        for zero, block in ((1, "llama"), (3, "rar")):
            found[f"{block} zero{zero} compiled"] = run(world, block, zero=zero, compile=True)
    return found


if __name__ == "__main__":
    work(runs)
