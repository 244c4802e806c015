"""One rank of test_reduction.py: what gradients become on their way between ranks.

Run as `python reduction_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

from typing import Any

import deepspeed
import torch
from small_stage import work
from torch import Tensor, nn

from taming_dist.engine import settings
from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import PRECISIONS, REDUCTIONS, EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.training.metrics import read
from taming_dist.training.optimization import OptimConfig

SIDE, LAYERS, BUCKET = 4, 6, 40
GRADIENTS = (2**-6, 2**-15)  # of every weight on either rank; in bf16 the sum is the first


class Net(nn.Module):
    """Layers that autocast takes to half precision, and a weight that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))
        self.weight = nn.Parameter(torch.ones(SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x).float() for layer in self.layers), self.weight * x)


def step(world: World, **config: Any) -> dict[str, Any]:
    """The metrics of a step in which every weight has the same gradient, and in what dtypes there
    are weights, and numbers that the optimizer moves."""
    engine_config = EngineConfig(persist_below=0, **config)
    net = build_network(Net, engine_config, world)
    groups = [{"params": list(net.parameters())}]
    engine = Engine(net, groups, OptimConfig(lr=0.1), engine_config, world, 1, 1)
    engine.backward((engine(torch.ones(1, SIDE)) * GRADIENTS[world.rank]).sum())
    engine.step()
    kept = {str(tensor.dtype) for tensor in (*engine.masters(), *net.parameters())}
    return {**read(engine.window_metrics()), "kept": sorted(kept)}


def reduced(world: World) -> list[int]:
    """How many numbers each reduction of a step at ZeRO 0 takes."""
    sizes, reduce = [], deepspeed.comm.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    deepspeed.comm.all_reduce = count
    step(world)
    deepspeed.comm.all_reduce = reduce
    return sizes


def runs(world: World) -> dict[str, Any]:
    settings.BUCKET = BUCKET
    found: dict[str, Any] = {"sizes": reduced(world)}
    for precision in PRECISIONS:  # fp32 first: DeepSpeed does not forget that there was autocast
        for zero in range(4):
            for reduce in REDUCTIONS:
                config: dict[str, Any] = {"zero": zero, "precision": precision, "reduce": reduce}
                found[f"zero{zero} {precision} {reduce}"] = step(world, **config)
    return found


if __name__ == "__main__":
    work(runs)
