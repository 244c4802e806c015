"""One rank of test_sameness.py: snapshots of a network, before and after a bit of it is flipped.

Run as `python sameness_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

from typing import Any

import torch
from restarts_worker import Table
from small_stage import work

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.training.optimization import OptimConfig


class Counting(Table):
    """A table with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(3))


def flip(values: torch.Tensor) -> None:
    """Flip the lowest bit of the first number."""
    values.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def runs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for zero in range(4):
        config = EngineConfig(zero=zero, persist_below=10 if zero == 3 else 0)
        torch.manual_seed(0)
        network = build_network(Counting, config, world)
        groups = [{"params": list(network.parameters())}]
        engine = Engine(network, groups, OptimConfig(lr=0.1), config, world, 2, 1, 1000)
        engine.set_lr(0.1)
        engine.backward(engine(torch.full((2, 3), 1.0 + world.rank)).square().mean())
        engine.step()
        healthy = engine.snapshot()
        found[f"zero{zero} healthy"] = [healthy.difference, len(healthy.pieces) > 0]
        last = world.rank == world.world_size - 1
        if last:
            flip(engine.module.seen)
        found[f"zero{zero} buffer"] = engine.snapshot().difference
        if last:
            flip(engine.module.seen)
            flip(engine.module.before.bias.data)
        broken = engine.snapshot()
        found[f"zero{zero} weight"] = [broken.difference, len(broken.pieces) > 0]
    return found


if __name__ == "__main__":
    work(runs)
