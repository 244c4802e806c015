"""One rank of test_equality.py: trains the same small stages under every ZeRO stage.

Run as `python equality_worker.py OUT core|all` with torchrun's variables; writes OUT-<rank>.json.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from small_prior import code_batches, small_prior
from small_stage import Lines, codebook_digest, load, norms_of, save, small_recipe, train, work
from tiny_timm import save_timm

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.losses.terms import GramConfig, L2Config, LogitsConfig, SemanticConfig, VFConfig
from taming_dist.models.discriminators import DinoConfig, PatchGANConfig, StyleGANConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, STEPS, DISC_START = 4, 8, 2
# Biases before a GroupNorm have no gradient but rounding, which Adam blows up to whole steps: small
# steps keep that noise small.
STAGE_1 = OptimConfig(lr=1e-4)
STAGE_2 = OptimConfig(lr=1e-3, name="adamw", weight_decay=0.1, clip=0.05)
QUANTIZERS = {
    "vector": VectorQuantizerConfig(codes=24, dim=8),
    "ema": EMAQuantizerConfig(codes=24, dim=8, decay=0.8, revive_below=0.3),
}
PAPER = {"size": 32, "l1": 1.0, "l2": 0.0, "perceptual": 1.0}
# All that steadies D, where nothing but the global batch may matter
STEADY = {
    "adaptive": "lagged",
    "r1_weight": 0.1,
    "r1_every": 2,
    "lecam_weight": 0.3,
    "lecam_decay": 0.5,
    "augment": ["color", "translation", "cutout"],
    "disc_warmup": 1,
    "disc_ramp": 3,
    "discriminator": PatchGANConfig(channels=8, layers=2, norm="group"),
}
# What takes statistics over all ranks, but not over micro-batches
OVER_RANKS = {
    "actnorm": {
        "discriminator": PatchGANConfig(channels=8, layers=2, norm="actnorm"),
        "order": "updated",
    },
    "stylegan": {
        "size": 32,
        "discriminator": StyleGANConfig(32, 8, 16),
        "r1_weight": 0.1,
        "r1_every": 1,
    },
    "dino": {"discriminator": DinoConfig(weights="random", depths=[2])},
}
SMOOTH = {"cosine_margin": 0.0, "distance_margin": 0.0}


def terms(folder: Path) -> dict[str, Any]:
    """All terms that stand on frozen networks, two of which have trained projections."""
    vit, convnext = (save_timm(folder, name) for name in ("test_vit", "test_convnext"))
    found = {
        "l2": L2Config(),
        "gram": GramConfig(net="alex", weights="random"),
        "logits": LogitsConfig(**convnext),
        "vf": VFConfig(size=32, **SMOOTH, **vit),
        "semantic": SemanticConfig(size=32, **vit),
    }
    return {"size": 32, "terms": found}


def context_of(world: World, zero: int, accumulation: int, optim: OptimConfig) -> Context:
    engine = EngineConfig(zero=zero, persist_below=0)
    micro_batch = GLOBAL_BATCH // (world.world_size * accumulation)
    return Context(optim, engine, world, micro_batch, accumulation)


def build(world: World, zero: int, quantizer: str, accumulation: int, **loss: Any) -> VQGANRecipe:
    context = context_of(world, zero, accumulation, STAGE_1)
    return small_recipe(QUANTIZERS[quantizer], context, **{"disc_start": DISC_START} | loss)


def run(
    world: World,
    zero: int,
    quantizer: str,
    accumulation: int,
    steps: int = STEPS,
    **loss: Any,
) -> dict[str, Any]:
    recipe = build(world, zero, quantizer, accumulation, **loss)
    return report(recipe, train(recipe, range(steps), STEPS))


def report(recipe: VQGANRecipe, lines: Lines) -> dict[str, Any]:
    return {
        "lines": lines,
        "codebook": codebook_digest(recipe),
        "norms": norms_of(recipe.generator),
        "judge": norms_of(recipe.engines["discriminator"]),
    }


def run_and_resume(world: World, zero: int) -> tuple[dict[str, Any], Lines]:
    """A run that is saved after its second step, when D has not made one yet, and goes on; and its
    next two steps from what was saved."""
    recipe = build(world, zero, "vector", 2, **PAPER)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(world.broadcast(made))
        lines = train(recipe, range(DISC_START), STEPS)
        save(recipe, folder)
        lines += train(recipe, range(DISC_START, STEPS), STEPS)
        fresh = load(build(world, zero, "vector", 2, **PAPER), folder)
        resumed = train(fresh, range(DISC_START, DISC_START + 2), STEPS)
        world.barrier()
    return report(recipe, lines), resumed


def run_transformer(world: World, zero: int, accumulation: int) -> dict[str, Any]:
    """Stage 2 with replaced inputs, decay groups and a clipped gradient."""
    recipe = small_prior("gpt", context_of(world, zero, accumulation, STAGE_2))
    lines = train(recipe, range(STEPS), STEPS, code_batches)
    return {"lines": lines, "norms": norms_of(recipe.transformer)}


def runs(world: World) -> dict[str, Any]:
    """What is compared, by name: all of it, or what `make test` has the time for."""
    whole = "all" in sys.argv
    steady = {"steps": DISC_START + 3, **STEADY}
    per_rank = {"adaptive": "per_rank", **PAPER}
    found: dict[str, Any] = {
        "zero0 vector x1": run(world, 0, "vector", 1, **PAPER),
        "zero0 transformer x1": run_transformer(world, 0, 1),
        "zero0 per_rank": run(world, 0, "vector", 1, DISC_START + 1, **per_rank),
    }
    if whole:
        found["zero0 ema x2"] = run(world, 0, "ema", 2)
        found["zero0 steady x1"] = run(world, 0, "vector", 1, **steady)
    over_ranks = dict(OVER_RANKS)
    if whole:
        over_ranks["terms"] = terms(Path(f"{sys.argv[1]}-{world.rank}-timm"))
    for zero in range(4) if whole else (0, 3):
        first, resumed = run_and_resume(world, zero)
        found |= {f"zero{zero} vector x2": first, f"zero{zero} resumed": {"lines": resumed}}
        found[f"zero{zero} transformer x2"] = run_transformer(world, zero, 2)
        if not whole:
            continue
        found[f"zero{zero} ema x1"] = run(world, zero, "ema", 1)
        found[f"zero{zero} steady x2"] = run(world, zero, "vector", 2, **steady)
        for name, loss in over_ranks.items():
            found[f"zero{zero} {name} x1"] = run(world, zero, "vector", 1, 3, disc_start=1, **loss)
    return found


if __name__ == "__main__":
    work(runs)
