"""The first lines of a run: what follows from its configuration."""

from typing import Any

from taming_dist.cli import count
from taming_dist.data.batching import BatchSizes
from taming_dist.engine.tf32 import EXACT
from taming_dist.engine.world import World
from taming_dist.models.export import Exported
from taming_dist.stages.interface import Config
from taming_dist.training.recipe import Recipe


def describe(config: Config, world: World, batch: BatchSizes, recipe: Recipe) -> str:
    """What follows from the configuration, for the person at the terminal."""
    sizes = ", ".join(
        f"{name} {size(engine.module)}{parts(engine.module)}"
        for name, engine in recipe.engines.items()
    )
    return "\n".join(
        [
            f"run       {config.run.name} in {config.run.dir}",
            *([f"scaled    {', '.join(config.scaled)}"] if config.scaled else []),
            f"networks  {sizes}",
            f"batch     {batch_line(batch)}",
            f"lr        {config.optim.peak(batch.global_batch):.3g} ({config.optim.schedule})",
            f"engine    ZeRO {config.engine.zero}, {config.engine.precision}"
            f"{' with TF32' if config.engine.allowed_tf32 != EXACT else ''}, {world.device.type}"
            f"{', own kernels' if any(engine.lean for engine in recipe.engines.values()) else ''}",
        ]
    )


def batch_line(batch: BatchSizes) -> str:
    """How the global batch is cut."""
    return (
        f"{batch.global_batch} images = {count(batch.world_size, 'rank')} x {batch.micro_batch} x "
        f"{batch.accumulation} micro-batches"
    )


def parts(network: Any) -> str:
    """The sizes of what an exported model consists of."""
    if not isinstance(network, Exported):
        return ""
    sizes = [f"{name} {size(child)}" for name, child in network.named_children()]
    return f" ({', '.join(sizes)})"


def size(module: Any) -> str:
    """Millions of numbers that a network keeps, trained or not (the codebook that moves by
    statistics, BatchNorm's), also where ZeRO-3 has cut them up."""
    count = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    count += sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())
    return f"{count / 1e6:.3f} M"
