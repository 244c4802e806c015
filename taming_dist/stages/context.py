"""What every recipe is given beside its model and its loss."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.training.optimization import OptimConfig


@dataclasses.dataclass(frozen=True)
class Context:
    """How networks are trained, on which ranks, and how the global batch is cut: each rank takes
    `accumulation` micro-batches of `micro_batch` images in an optimizer step. `skip_spikes`,
    `freeze`: see `train`."""

    optim: OptimConfig
    engine: EngineConfig
    world: World
    micro_batch: int
    accumulation: int = 1
    seed: int = 0
    skip_spikes: float = 0.0
    freeze: Sequence[str] = ()

    def build(
        self, make: Callable[[], nn.Module], seed: int, initial: Mapping[str, Tensor] | None = None
    ) -> Any:
        """A network with weights drawn from a seed, the same everywhere, or the `initial` ones."""
        torch.manual_seed(seed)
        return build_network(make, self.engine, self.world, initial)

    def start(
        self, network: nn.Module, groups: list[dict[str, Any]] | None = None, ema_half_life: int = 0
    ) -> Engine:
        """An engine for a network of `build`; without `groups` all it trains is one."""
        if groups is None:
            groups = [{"params": [p for p in network.parameters() if p.requires_grad]}]
        return Engine(
            network,
            groups,
            self.optim,
            self.engine,
            self.world,
            self.micro_batch,
            self.accumulation,
            ema_half_life=ema_half_life,
            skip_spikes=self.skip_spikes,
        )
