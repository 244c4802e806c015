"""What the workers of these tests share: a small stage 1, its data, and what is compared of it."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.launch import environment_place
from taming_dist.losses.terms import L1Config, L2Config, PerceptualConfig
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means, read

Lines = list[dict[str, float]]


@dataclass
class Images:
    columns: dict[str, torch.Tensor]


def small_recipe(
    quantizer: Any,
    context: Context,
    size: int = 16,
    levels: int = 2,
    l1: float = 0.0,
    l2: float = 1.0,
    perceptual: float = 0.0,
    **loss: Any,
) -> VQGANRecipe:
    """Stage 1 for images of `size` pixels with a small D; `l1` to `perceptual` are the weights of
    its terms, other keywords change the rest of the loss.

    It is L2, which has no kink: where an error of L1 changes its sign in one run and not in the
    other, their gradients part at once. LPIPS, which needs 32 pixels, counts where it has a weight.
    """
    model = VQGANConfig(
        quantizer=quantizer,
        resolution=size,
        channels=32,
        multipliers=[1] * levels,
        blocks=1,
        attention_resolutions=[],
        latent_channels=16,
    )
    defaults: dict[str, Any] = {
        "terms": {
            "l1": L1Config(l1),
            "l2": L2Config(l2),
            "perceptual": PerceptualConfig(perceptual, net="alex", weights="random"),
        },
        "discriminator": PatchGANConfig(channels=8, layers=2),
    }
    return VQGANRecipe(model, VQGANLossConfig(**defaults | loss), context)


def global_batch(context: Context) -> int:
    return context.micro_batch * context.accumulation * context.world.world_size


def image_batches(recipe: VQGANRecipe, step: int) -> Iterator[Images]:
    """This rank's share of the global batch: rank r has rows r, r + R ... of each micro-batch."""
    context, world = recipe.context, recipe.world
    size = recipe.generator.module.config.resolution
    randomness = torch.Generator().manual_seed(step)
    shape = (global_batch(context), 3, size, size)
    images = torch.randint(0, 256, shape, generator=randomness, dtype=torch.uint8)
    for part in images.chunk(context.accumulation):
        yield Images({"image": part[world.rank :: world.world_size].contiguous()})


def train(
    recipe: Any,
    steps: range,
    total: int,
    batches: Callable[[Any, int], Iterator[Any]] = image_batches,
) -> Lines:
    """All figures of some of the `total` steps, over all ranks."""
    size, lines = global_batch(recipe.context), []
    for step in steps:
        clock, means = Clock(size, total, images=step * size), Means()
        parts = recipe.train_step(batches(recipe, step), clock)
        moved = torch.ones((), dtype=torch.bool, device=recipe.world.device)
        means.add_all(parts, moved)  # those of a skipped step are looked at, too
        lines.append(read(means.take(recipe.world) | recipe.window_metrics()))
    return lines


def save(recipe: VQGANRecipe, folder: Path) -> None:
    """All engines, on all ranks; none goes on before all are written."""
    for name, engine in recipe.engines.items():
        engine.snapshot().write(folder / name)
    recipe.world.barrier()


def load(recipe: VQGANRecipe, folder: Path) -> VQGANRecipe:
    for name, engine in recipe.engines.items():
        engine.load(folder, name)
    return recipe


def norms_of(engine: Engine) -> dict[str, float] | None:
    """The norm of every tensor of a network, on the first rank."""
    state = engine.full_state()
    if state is None:
        return None
    return {name: float(value.double().norm()) for name, value in state.items()}


def codebook_digest(recipe: VQGANRecipe) -> str:
    """sha256 of the codebook as this rank has it."""
    quantizer = recipe.generator.module.quantize
    if hasattr(quantizer, "entries"):
        return digest([quantizer.entries, quantizer.cluster_size, quantizer.cluster_sum])
    table = quantizer.embed if hasattr(quantizer, "embed") else quantizer.embedding
    with recipe.generator._gathered(table.weight):
        return digest([table.weight])


def digest(tensors: list[torch.Tensor]) -> str:
    data = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(data).hexdigest()


def work(find: Callable[[World], dict[str, Any]]) -> None:
    """The life of a rank: what it finds goes to OUT-<rank>.json, OUT being the first argument."""
    torch.set_num_threads(1)
    world = init_world(environment_place())
    found = find(world)
    Path(f"{sys.argv[1]}-{world.rank}.json").write_text(json.dumps(found))
    shutdown()
