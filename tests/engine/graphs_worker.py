"""One rank of test_graphs.py: the same steps with passes that are recorded, and without.

Run as `python graphs_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json. On the CPU a
recorded pass is run the way that a GPU replays it, from and to the same tensors.
"""

import itertools
from typing import Any

from small_stage import norms_of, small_recipe, train, work

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.stages.context import Context
from taming_dist.training.optimization import OptimConfig

GLOBAL_BATCH, STEPS = 4, 3
CASES = list(itertools.product(("fp32", "bf16"), (0, 1, 2), (2,), ("reused",), ("",)))
CASES += [("fp32", 2, 1, "updated", ""), ("bf16", 0, 1, "updated", "")]
CASES += [("fp32", 0, 2, "reused", "encoder"), ("fp32", 2, 2, "reused", "decoder")]


def run(
    world: World, graphs: bool, precision: str, zero: int, parts: int, order: str, freeze: str
) -> Any:
    """All figures of a few steps with a GAN, and the norms of all weights after them."""
    engine = EngineConfig(zero=zero, precision=precision, graphs=graphs)
    micro_batch = GLOBAL_BATCH // (world.world_size * parts)
    optim, cut = OptimConfig(lr=1e-3, ema_half_life=20), (micro_batch, parts)
    context = Context(optim, engine, world, *cut, freeze=[freeze] if freeze else [])
    quantizer = VectorQuantizerConfig(codes=24, dim=8)
    recipe = small_recipe(quantizer, context, disc_start=1, order=order)
    lines = train(recipe, range(STEPS), STEPS)
    recorded = [
        hasattr(getattr(recipe.generator.module, n), "_kept") for n in ("latents", "decoded")
    ]
    assert recorded == [graphs, graphs]
    return {"lines": lines, "norms": norms_of(recipe.generator)}


def main(world: World) -> dict[str, Any]:
    return {
        " ".join(map(str, case)): [run(world, graphs, *case) for graphs in (False, True)]
        for case in CASES
    }


if __name__ == "__main__":
    work(main)
