"""What every recipe is given beside its model and its loss."""

import dataclasses
from typing import Any

from torch import nn

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.training.optimization import OptimConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """How networks are trained, on which ranks, and how the global batch is cut: each rank takes
    `accumulation` micro-batches of `micro_batch` images in an optimizer step."""

    optim: OptimConfig
    engine: EngineConfig
    world: World
    micro_batch: int
    accumulation: int = 1
    seed: int = 0

    def start(
        self, network: nn.Module, groups: list[dict[str, Any]] | None = None, ema_half_life: int = 0
    ) -> Engine:
        """An engine for the network; all its parameters are one group if no `groups` are given."""
        if groups is None:
            groups = [{"params": list(network.parameters())}]
        cut = (self.world, self.micro_batch, self.accumulation)
        return Engine(network, groups, self.optim, self.engine, *cut, ema_half_life)
