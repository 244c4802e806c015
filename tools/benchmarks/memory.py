"""`tools/benchmark.py memory`: what a rank holds of the trained networks, by ZeRO stage.

Real engines on gloo train an f16 VQGAN of half the paper's width and its discriminator for one step
and the first micro-batch of the next; then every distinct block of memory that the engines hold
counts, beside what arXiv 1910.02054 (table 1) expects for weights in fp32.
"""

import argparse
import gc
import resource
from collections.abc import Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import worlds
from taming_dist import cli

CHANNELS, SIZE, HALF_LIFE = 64, 32, 1000
COLUMNS = ("weights", "gradients", "optimizer", "other", "average")
MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=cli.COUNT, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every stage at every number of ranks, in processes of their own; print a table."""
    worlds.prepare()
    head = " ".join(f"{name:>10}" for name in (*COLUMNS, "sum", "expected", "peak RSS"))
    print(f"MB on the fullest rank, {arguments.precision}; the sum is without the average")
    print(f"ranks zero {head}")
    figures = {}
    for ranks in arguments.ranks:
        for zero in range(4):
            found = fullest(worlds.launch(partial(measure, zero, arguments.precision), ranks))
            figures[f"{ranks} ranks, ZeRO {zero}"] = found
            held = [found[name] for name in COLUMNS]
            numbers = (*held, sum(held[:-1]), expected(found["parameters"], ranks, zero))
            row = " ".join(f"{number / MEGABYTE:10.1f}" for number in (*numbers, found["rss"]))
            print(f"{ranks:5} {zero:4} {row}", flush=True)
    return figures


def expected(parameters: float, ranks: int, zero: int) -> float:
    """Bytes of weights, gradients and Adam's two moments, 16 per parameter, cut as ZeRO says."""
    shares = {0: 16, 1: 8 + 8 / ranks, 2: 4 + 12 / ranks, 3: 16 / ranks}
    return parameters * shares[zero]


def fullest(found: list[dict[str, float]]) -> dict[str, float]:
    return max(found, key=lambda rank: sum(rank[name] for name in COLUMNS))


def measure(zero: int, precision: str, _: Any) -> dict[str, float]:
    """Bytes that this rank holds in the middle of a step of two micro-batches, by their use."""
    from taming_dist.engine.settings import EngineConfig
    from taming_dist.engine.start import init_world, shutdown
    from taming_dist.launch import environment_place
    from taming_dist.losses.terms import L1Config, PerceptualConfig
    from taming_dist.models.quantizers import VectorQuantizerConfig
    from taming_dist.models.vqgan import VQGANConfig
    from taming_dist.stages.context import Context
    from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
    from taming_dist.training.clock import Clock
    from taming_dist.training.optimization import OptimConfig

    torch.set_num_threads(1)
    world = init_world(environment_place())
    model = VQGANConfig(VectorQuantizerConfig(codes=1024, dim=256), channels=CHANNELS)
    terms = {"l1": L1Config(), "perceptual": PerceptualConfig(net="alex", weights="random")}
    loss = VQGANLossConfig(terms, disc_start=0)
    optim = OptimConfig(lr=1e-5, ema_half_life=HALF_LIFE)
    engine = EngineConfig(zero=zero, precision=precision, persist_below=0)
    recipe = VQGANRecipe(model, loss, Context(optim, engine, world, micro_batch=1, accumulation=2))
    images = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    batches = [SimpleNamespace(columns={"image": images})] * 2
    clock = Clock(global_batch=2 * world.world_size, total_steps=2, images=0)
    for _ in recipe.train_step(batches, clock):
        pass
    clock.tick()
    half_a_step = recipe.train_step(batches, clock)
    next(half_a_step)
    found = Held(recipe).by_use()
    found["parameters"] = sum(
        getattr(p, "ds_numel", p.numel())
        for engine in recipe.engines.values()
        for p in engine.module.parameters()
    )
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    world.barrier()
    shutdown()
    return found


class Held:
    """Distinct blocks of memory, each counted for the first use that claims it."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self._seen: set[int] = set()

    def by_use(self) -> dict[str, float]:
        """Bytes of weights, gradients, optimizer (fp32 copies and moments), the average of the
        weights, and of all other tensors there are: DeepSpeed's buckets, and the micro-batch."""
        engines = list(self.recipe.engines.values())
        parameters = [p for engine in engines for p in engine.module.parameters()]
        self._claim(self._frozen())
        shards = (p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))
        found = {"weights": self._claim([*(p.data for p in parameters), *shards])}
        found["gradients"] = self._claim(
            gradient for engine in engines for gradient in gradients_of(engine)
        )
        found["optimizer"] = self._claim(
            part for engine in engines for part in optimizer_parts(engine)
        )
        found["average"] = self._claim(
            shard for engine in engines if engine._average for shard in engine._average.shards
        )
        found["other"] = self._claim(o for o in gc.get_objects() if issubclass(type(o), Tensor))
        return found

    def _frozen(self) -> Iterator[Tensor]:
        """What no stage cuts: the networks of the loss and the buffers of the trained ones."""
        yield from self.recipe.reconstruction.state_dict().values()
        for engine in self.recipe.engines.values():
            yield from engine.module.buffers()

    def _claim(self, tensors: Iterable[Tensor]) -> float:
        total = 0
        for tensor in tensors:
            block = tensor.untyped_storage()
            if tensor.device.type == "cpu" and block.data_ptr() not in self._seen:
                self._seen.add(block.data_ptr())
                total += block.nbytes()
        return float(total)


def gradients_of(engine: Any) -> Iterator[Tensor]:
    """The gradients that an engine keeps between two micro-batches."""
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    optimizer = engine._engine.optimizer
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)  # ZeRO 3
    if flat is not None:
        yield flat
    for name in ("averaged_gradients", "all_grad_tensors"):  # ZeRO 2
        for group in getattr(optimizer, name, {}).values():
            yield from group or ()


def optimizer_parts(engine: Any) -> Iterator[Tensor]:
    """The fp32 copies of the weights that the optimizer moves, and its moments."""
    yield from engine.masters()
    optimizer = engine._engine.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        yield from (part for part in state.values() if isinstance(part, Tensor))
