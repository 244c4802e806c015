"""`tools/benchmark.py scaling`: a step on 1, 2, 4 ranks by ZeRO stage: time, memory, messages.

Ranks are processes of this machine with a thread each, on gloo. "Alone" are as many processes that
do the same work without each other, at the same time: what sharing the cores costs is in it, what
remains is the price of working together. What is predicted is "alone" and the time that the counted
messages take at the speeds at which messages of that size went between these very ranks.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import worlds
from benchmarks.forecast import Measured, exposed
from benchmarks.machine import describe
from benchmarks.rows import Row, Rows, this_run
from benchmarks.tables import heading, lines
from benchmarks.timing import PeakMemory
from benchmarks.traffic import GATHER, SCATTER, SUM, Traffic, expected, sent, summed, theory
from taming_dist import cli

CPU = torch.device("cpu")
# a step, the trained networks with how often ZeRO 3 gathers each in it, the settings of the engines
Built = tuple[Callable[[], None], dict[nn.Module, int], Any]
WARM_UP = 2
PATHS = ("taming_dist/engine", "taming_dist/stages", "taming_dist/models",
         "tools/benchmarks/scaling.py", "tools/benchmarks/traffic.py")  # fmt: skip
SHORT = ["--stages", "2", "--ranks", "1", "2", "--steps", "5"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stage, zero = cli.number(int, at_least=1, at_most=2), cli.number(int, at_least=0, at_most=3)
    parser.add_argument("--stages", type=stage, nargs="+", default=[1, 2], help="of the chain")
    parser.add_argument("--zero", type=zero, nargs="+", default=[0, 1, 2, 3], help="stages of ZeRO")
    parser.add_argument(
        "--ranks", type=cli.COUNT, nargs="+", default=[1, 2, 4], help="up to 8, say"
    )
    parser.add_argument("--steps", type=cli.COUNT, default=7, help="that are timed")
    parser.add_argument("--layers", type=cli.COUNT, default=4, help="of the transformer")
    parser.add_argument("--width", type=cli.COUNT, default=256, help="of the transformer")
    parser.add_argument("--tokens", type=cli.COUNT, default=256, help="of an image")
    parser.add_argument("--channels", type=cli.COUNT, default=32, help="of the VQGAN")
    parser.add_argument("--size", type=cli.COUNT, default=64, help="pixels across of its images")
    parser.add_argument("--batch", type=cli.COUNT, default=2, help="images of a micro-batch")
    parser.add_argument("--accumulation", type=cli.COUNT, default=1, help="micro-batches of a step")


def run(arguments: argparse.Namespace) -> Rows:
    """Measure every stage of training and of ZeRO at every number of ranks."""
    worlds.prepare()
    torch.set_num_threads(1)
    begun, rows = this_run(describe(CPU, {})), list[Row]()
    for stage in arguments.stages:
        for ranks in arguments.ranks:
            work = partial(measure, arguments, stage)
            together = worlds.launch(work, ranks)
            alone = worlds.launch(work, 1, worlds=ranks) if ranks > 1 else together
            rows += [row_of(arguments, stage, zero, together, alone) for zero in arguments.zero]
    found = Rows(begun, rows)
    print("\n".join([heading(found.run), *lines(rows)]), flush=True)
    return found


def row_of(arguments: Any, stage: int, zero: int, together: list[Any], alone: list[Any]) -> Row:
    """The row of one stage of ZeRO, from what the ranks found."""
    ranks, first = len(together), together[0]["zero"][zero]
    seconds = statistics.median(first["seconds"])
    apart = statistics.mean(statistics.median(each["zero"][zero]["seconds"]) for each in alone)
    link = Measured(together[0]["rates"], together[0]["latency"])
    waiting = exposed(link, first["bytes"], first["calls"], ranks, zero) if ranks > 1 else 0.0
    notes = {
        "sent MB": sent(first["bytes"], ranks) / 1e6,
        "as DeepSpeed is set MB": sent(first["expected"], ranks) / 1e6,
        "least in theory MB": sent(first["theory"], ranks) / 1e6,
        "messages": float(sum(first["calls"].values())),
        "alone ms": 1e3 * apart,
        "over alone, %": 100 * (seconds / apart - 1),
        "predicted ms": 1e3 * (apart + waiting),
    }
    name = {1: "VQGAN and D", 2: "transformer"}[stage]
    return Row(
        "scaling",
        f"{name}, {first['parameters'] / 1e6:.1f} M parameters, ZeRO {zero}, "
        f"{cli.count(ranks, 'rank')}",
        "ours",
        arguments.batch * arguments.accumulation * ranks / seconds,
        "images/s",
        "fp32",
        ms=1e3 * seconds,
        memory_mb=max(each["zero"][zero]["memory"] for each in together) / 1e6,
        notes=notes if ranks > 1 else {},
        paths=PATHS,
    )


def measure(arguments: argparse.Namespace, stage: int, barrier: Any) -> dict[str, Any]:
    """What one rank finds: by ZeRO stage, and how fast messages are."""
    from taming_dist.engine.start import init_world, shutdown
    from taming_dist.launch import environment_place

    torch.set_num_threads(1)
    world = init_world(environment_place())
    found: dict[str, Any] = {"zero": {}}
    for zero in arguments.zero:
        watched = PeakMemory(CPU)
        step, networks, engine = STAGES[stage](arguments, zero, world)
        for _ in range(WARM_UP):
            step()
        memory = watched.read()
        with Traffic() as traffic:
            step()
        seconds = []
        barrier.wait()
        for _ in range(arguments.steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        barrier.wait()
        sizes = {network: elements(network) for network in networks}
        parameters = sum(map(sum, sizes.values()))
        set_here = [
            expected(sizes[network], engine, world.world_size, arguments.accumulation, walks)
            for network, walks in networks.items()
        ]
        found["zero"][zero] = {
            "seconds": seconds,
            "memory": memory or 0.0,
            "parameters": parameters,
            "calls": dict(traffic.calls),
            "bytes": dict(traffic.bytes),
            "expected": dict(summed(set_here)),
            "theory": dict(theory(parameters, zero)),
        }
        del step, networks
    if world.world_size > 1:
        found |= speeds(parameters, world.world_size)
    else:
        found |= {"rates": {}, "latency": 0.0}
    world.barrier()
    shutdown()
    return found


def elements(network: nn.Module) -> list[int]:
    """The elements of each parameter that is trained, also where ZeRO 3 has cut it up."""
    return [getattr(p, "ds_numel", p.numel()) for p in network.parameters() if p.requires_grad]


def speeds(parameters: int, ranks: int) -> dict[str, Any]:
    """Seconds per byte of messages that have the size of all parameters, by kind, and of a message
    of one number."""
    whole = torch.zeros(-(-parameters // ranks) * ranks)
    part, one = torch.zeros(len(whole) // ranks), torch.zeros(())
    messages: dict[str, Callable[[], Any]] = {
        SUM: lambda: dist.all_reduce(whole),
        GATHER: lambda: dist.all_gather_into_tensor(whole, part),
        SCATTER: lambda: dist.reduce_scatter_tensor(part, whole),
    }
    rates = {kind: spent(send) / (4 * len(whole)) for kind, send in messages.items()}
    return {"rates": rates, "latency": spent(lambda: dist.all_reduce(one), 50)}


def spent(send: Callable[[], Any], calls: int = 5) -> float:
    """Median seconds of a message."""
    found = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        send()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def transformer(arguments: Any, zero: int, world: Any) -> Built:
    """A step of the second stage."""
    from taming_dist.data.codes import CodeBatch
    from taming_dist.engine.settings import EngineConfig
    from taming_dist.models.prior.conditions import ClassCondition
    from taming_dist.models.prior.transformer import TransformerConfig
    from taming_dist.stages.context import Context
    from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
    from taming_dist.training.optimization import OptimConfig

    batch, engine = arguments.batch, EngineConfig(zero=zero, persist_below=0)
    config = TransformerConfig(
        1024,
        [1, arguments.tokens],
        layers=arguments.layers,
        heads=arguments.width // 64 or 1,
        width=arguments.width,
        condition=ClassCondition(1000),
    )
    optim = OptimConfig("adamw", lr=1e-5, betas=[0.9, 0.95], weight_decay=0.01)
    context = Context(optim, engine, world, batch, arguments.accumulation)
    recipe = TransformerRecipe(config, TokenLossConfig(), context)
    codes = torch.randint(1024, (batch, 1, arguments.tokens))
    columns = {"codes": codes, "cls": torch.zeros(batch, dtype=torch.int64)}
    step = stepping(recipe, CodeBatch(columns, torch.arange(batch)), context)
    return step, {recipe.network: 1}, engine


def vqgan(arguments: Any, zero: int, world: Any) -> Built:
    """A step of the first stage with the GAN on and without LPIPS, whose work no rank shares."""
    from taming_dist.engine.settings import EngineConfig
    from taming_dist.losses.terms import L1Config
    from taming_dist.models.quantizers import VectorQuantizerConfig
    from taming_dist.models.vqgan import VQGANConfig
    from taming_dist.stages.context import Context
    from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
    from taming_dist.training.optimization import OptimConfig

    size, batch = arguments.size, arguments.batch
    engine = EngineConfig(zero=zero, persist_below=0)
    config = VQGANConfig(VectorQuantizerConfig(codes=1024, dim=256), size, arguments.channels)
    loss = VQGANLossConfig({"l1": L1Config()}, disc_start=0)
    context = Context(OptimConfig(lr=1e-5), engine, world, batch, arguments.accumulation)
    recipe = VQGANRecipe(config, loss, context)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    step = stepping(recipe, SimpleNamespace(columns={"image": images}), context)
    judge = recipe.engines["discriminator"].module
    # D looks at the reconstruction for G, forward and backward, and then at two batches of its own
    return step, {recipe.generator.module: 1, judge: 4}, engine


def stepping(recipe: Any, given: Any, context: Any) -> Callable[[], None]:
    """One step of a recipe after the other, every micro-batch the same."""
    from taming_dist.training.clock import Clock

    micro_batches = [given] * context.accumulation
    images = context.micro_batch * context.accumulation * context.world.world_size
    clock = Clock(images, 2**31)

    def step() -> None:
        for _ in recipe.train_step(micro_batches, clock):
            pass
        clock.tick()

    return step


STAGES = {1: vqgan, 2: transformer}
