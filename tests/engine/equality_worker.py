"""One rank of test_equality.py: trains the same small stages under every ZeRO stage.

Run as `python equality_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World, environment_place
from taming_dist.engine.zero import Engine, init_world, shutdown
from taming_dist.models.discriminators import DinoConfig, PatchGANConfig, StyleGANConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.models.transformer import TransformerConfig
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.recipes.setup import Setup
from taming_dist.recipes.transformer import TokenLossConfig, TransformerRecipe
from taming_dist.recipes.vqgan import VQGANLossConfig, VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, STEPS, DISC_START = 4, 8, 2
# Biases before a GroupNorm have no gradient but rounding, which Adam blows up to whole steps: small
# steps keep that noise small.
LEARNING_RATE = 1e-4
QUANTIZERS = {
    "vector": VectorQuantizerConfig(codes=24, dim=8),
    "ema": EMAQuantizerConfig(codes=24, dim=8, decay=0.8, revive_below=0.3),
}


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
    "stylegan": {"discriminator": StyleGANConfig(32, 8, 16), "r1_weight": 0.1, "r1_every": 1},
    "dino": {"discriminator": DinoConfig(weights="random", depths=[2])},
}


@dataclass
class Images:
    images: torch.Tensor

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        return {"image": self.images}


def build(
    world: World, zero: int, quantizer: str, accumulation: int, **settings: Any
) -> VQGANRecipe:
    model = VQGANConfig(
        quantizer=QUANTIZERS[quantizer],
        resolution=32,
        channels=32,
        multipliers=[1, 1, 1],
        blocks=1,
        attention_resolutions=[],
        latent_channels=16,
    )
    defaults = {
        "disc_start": DISC_START,
        "lpips_net": "alex",
        "lpips_weights": "random",
        "discriminator": PatchGANConfig(channels=8, layers=2),
    }
    loss = VQGANLossConfig(**defaults | settings)
    engine = EngineConfig(zero=zero, persist_below=0)
    micro_batch = GLOBAL_BATCH // (world.world_size * accumulation)
    setup = Setup(OptimConfig(lr=LEARNING_RATE), engine, world, micro_batch, accumulation)
    return VQGANRecipe(model, loss, setup)


def micro_batches(world: World, step: int, accumulation: int) -> Iterator[Images]:
    """This rank's share of the global batch: rank r has rows r, r + R ... of each part."""
    randomness = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH, 3, 32, 32)
    images = torch.randint(0, 256, shape, generator=randomness, dtype=torch.uint8)
    for part in images.chunk(accumulation):
        yield Images(part[world.rank :: world.world_size].contiguous())


@dataclass
class Codes:
    codes: torch.Tensor
    classes: torch.Tensor


def code_batches(world: World, step: int, accumulation: int) -> Iterator[Codes]:
    """The same for stage 2."""
    randomness = torch.Generator().manual_seed(step)
    codes = torch.randint(24, (GLOBAL_BATCH, 3, 4), generator=randomness)
    classes = torch.randint(3, (GLOBAL_BATCH,), generator=randomness)
    mine = slice(world.rank, None, world.world_size)
    for part, kinds in zip(codes.chunk(accumulation), classes.chunk(accumulation), strict=True):
        yield Codes(part[mine], kinds[mine])


def run_transformer(world: World, zero: int, accumulation: int) -> dict[str, Any]:
    """Stage 2 with replaced inputs, decay groups and a clipped gradient."""
    model = TransformerConfig(
        vocabulary=24, grid=[3, 4], layers=2, heads=2, width=16, condition="class", classes=3
    )
    setup = Setup(
        OptimConfig(lr=1e-3, name="adamw", weight_decay=0.1, clip=0.05),
        EngineConfig(zero=zero, persist_below=0),
        world,
        GLOBAL_BATCH // (world.world_size * accumulation),
        accumulation,
    )
    recipe = TransformerRecipe(model, TokenLossConfig(pkeep=0.8), setup)
    lines = []
    for step in range(STEPS):
        clock, means = Clock(GLOBAL_BATCH, STEPS, images=step * GLOBAL_BATCH), Means()
        for scalars in recipe.train_step(code_batches(world, step, accumulation), clock):
            means.add(scalars)
        lines.append(means.take(world))
    return {"lines": lines, "norms": norms_of(recipe.transformer)}


def norms_of(engine: Engine) -> dict[str, float] | None:
    """The norm of every tensor of a network, on the first rank."""
    state = engine.full_state()
    if state is None:
        return None
    return {name: float(value.double().norm()) for name, value in state.items()}


def train(recipe: VQGANRecipe, accumulation: int, first: int, last: int) -> list[dict[str, float]]:
    """Scalars of each step, over all ranks, and how many codes were revived."""
    lines = []
    for step in range(first, last):
        clock, means = Clock(GLOBAL_BATCH, STEPS, images=step * GLOBAL_BATCH), Means()
        batches = micro_batches(recipe.world, step, accumulation)
        for scalars in recipe.train_step(batches, clock):
            means.add(scalars)
        window = recipe.window_metrics()
        kept = {name: window[name] for name in ("codebook_usage", "codebook_revived")}
        lines.append(means.take(recipe.world) | kept)
    return lines


def codebook_digest(recipe: VQGANRecipe) -> str:
    """sha256 of the codebook as this rank has it."""
    quantizer = recipe.generator.module.quantize
    if hasattr(quantizer, "entries"):
        tensors = [quantizer.entries, quantizer.cluster_size, quantizer.cluster_sum]
        return digest(tensors)
    with recipe.generator._gathered(quantizer.embedding.weight):
        return digest([quantizer.embedding.weight])


def digest(tensors: list[torch.Tensor]) -> str:
    data = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(data).hexdigest()


def run(
    world: World,
    zero: int,
    quantizer: str,
    accumulation: int,
    steps: int = STEPS,
    **settings: Any,
) -> dict[str, Any]:
    recipe = build(world, zero, quantizer, accumulation, **settings)
    lines = train(recipe, accumulation, 0, steps)
    norms = norms_of(recipe.generator)
    judge = norms_of(recipe.engines["discriminator"])
    codebook = codebook_digest(recipe)
    return {"lines": lines, "codebook": codebook, "norms": norms, "judge": judge}


def resumed(world: World, zero: int, folder: Path) -> list[dict[str, float]]:
    """Steps 2 to 4 from what was saved after step 2, when D had not made a step yet."""
    saved = build(world, zero, "vector", 1)
    train(saved, 1, 0, DISC_START)
    for name, engine in saved.engines.items():
        engine.save(folder, name)
    world.sum(torch.zeros(1))
    fresh = build(world, zero, "vector", 1)
    for name, engine in fresh.engines.items():
        engine.load(folder, name)
    return train(fresh, 1, DISC_START, DISC_START + 2)


def main() -> None:
    torch.set_num_threads(1)
    world = init_world(environment_place())
    found: dict[str, Any] = {
        "zero0 vector x1": run(world, 0, "vector", 1),
        "zero0 ema x2": run(world, 0, "ema", 2),
        "zero0 transformer x1": run_transformer(world, 0, 1),
        "zero0 steady x1": run(world, 0, "vector", 1, DISC_START + 3, **STEADY),
        "zero0 per_rank": run(world, 0, "vector", 1, adaptive="per_rank", steps=DISC_START + 1),
    }
    for zero in range(4):
        found[f"zero{zero} vector x2"] = run(world, zero, "vector", 2)
        found[f"zero{zero} transformer x2"] = run_transformer(world, zero, 2)
        found[f"zero{zero} ema x1"] = run(world, zero, "ema", 1)
        found[f"zero{zero} steady x2"] = run(world, zero, "vector", 2, DISC_START + 3, **STEADY)
        for name, settings in OVER_RANKS.items():
            found[f"zero{zero} {name} x1"] = run(
                world, zero, "vector", 1, DISC_START + 2, **settings
            )
        with tempfile.TemporaryDirectory() as folder:
            shared = Path(world.broadcast(folder))
            found[f"zero{zero} resumed"] = {"lines": resumed(world, zero, shared)}
            world.barrier()
    Path(f"{sys.argv[1]}-{world.rank}.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
