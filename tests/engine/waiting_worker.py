"""One rank of test_waiting.py: optimizer steps under a look-out for what would wait for a GPU.

Run as `python waiting_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from equality_worker import GLOBAL_BATCH
from small_prior import code_batches, small_prior
from small_stage import image_batches, small_recipe, work
from waiting import Waiting

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import Agreement, World
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.stages.context import Context
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means
from taming_dist.training.optimization import OptimConfig
from taming_dist.training.sinks import Sinks
from taming_dist.training.skips import LATE, Skips

ACCUMULATION, WARM, STEPS = 2, 3, 2  # DeepSpeed's timer waits from the third step on
OPTIM = OptimConfig(lr=1e-3, clip=0.5, ema_half_life=100)
SETTINGS = {"initial": "kmeans", "revive_below": 0.9}
QUANTIZERS = {
    "vector": VectorQuantizerConfig(codes=24, dim=8, **SETTINGS),
    "ema": EMAQuantizerConfig(codes=24, dim=8, **SETTINGS),
}
# by ZeRO stage
RUNS = [("fp32", "vector", "lagged"), ("bf16", "ema", "global")]
RUNS += [("fp16", "vector", "per_rank"), ("bf16", "vector", "lagged")]
PRIORS = ["codes", "masked", "llama", "rar"]
GAN = {
    "size": 32,
    "perceptual": 1.0,
    "disc_start": 0,
    "lecam_weight": 0.1,
    "r1_weight": 0.1,
    "r1_every": 2,
    "augment": ["color", "translation", "cutout"],
    "discriminator": PatchGANConfig(channels=8, layers=2, norm="batch"),
}


def context_of(world: World, zero: int, precision: str) -> Context:
    engine = EngineConfig(zero=zero, precision=precision, persist_below=0)
    micro_batch = GLOBAL_BATCH // (world.world_size * ACCUMULATION)
    return Context(OPTIM, engine, world, micro_batch, ACCUMULATION)


def first_stage(world: World, zero: int, precision: str, quantizer: str, adaptive: str) -> Any:
    context = context_of(world, zero, precision)
    return small_recipe(QUANTIZERS[quantizer], context, levels=3, adaptive=adaptive, **GAN)


def waits(recipe: Any, batches: Callable[[Any, int], Iterator[Any]]) -> list[str]:
    """What a few steps of training, once it is under way, have the host wait for."""
    world = recipe.world
    skips = Skips(recipe.engines, lambda batch: [], Sinks(None, []), world)
    means, asked, waiting = Means(), Agreement(world), Waiting()

    def step(number: int) -> None:
        clock = Clock(GLOBAL_BATCH, 100, images=number * GLOBAL_BATCH)
        micro_batches = list(batches(recipe, number))
        parts = list(recipe.train_step(micro_batches, clock))
        means.add_all(parts, skips.add(clock, micro_batches, parts))
        asked(False)

    for number in range(WARM):
        step(number)
    skips.tell(LATE)
    get_accelerator().synchronize = lambda *_: waiting.note("synchronize")
    with waiting:
        for number in range(WARM, WARM + STEPS):
            step(number)
    return sorted(set(waiting.found))


def runs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for zero in range(4):
        recipe = first_stage(world, zero, *RUNS[zero])
        found[f"zero{zero} vqgan"] = waits(recipe, image_batches)
        prior = small_prior(PRIORS[zero], context_of(world, zero, "bf16"), layers=1)
        found[f"zero{zero} prior"] = waits(prior, code_batches)
    return found


if __name__ == "__main__":
    work(runs)
