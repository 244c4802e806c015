"""`tools/benchmark.py forecast`: a step on up to 1,024 GPUs by ranks, bandwidth, batch: computed.

Nothing is measured here: docs/scaling.md has the assumptions, and its tables are what this prints.
The messages are those that `benchmarks.traffic` expects; the same sum, with speeds measured on the
spot, predicts the steps that `tools/benchmark.py scaling` times.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from benchmarks import flops
from benchmarks.tables import short, write_into
from benchmarks.traffic import GATHER, SUM, Messages, expected, sent, summed
from taming_dist import cli
from taming_dist.engine.settings import BUCKET, EngineConfig
from taming_dist.models.discriminators import build_discriminator
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.vqgan_loss import VQGANLossConfig

BACKWARD = 2 / 3  # of the time of forward and backward pass
RANKS = (1, 8, 64, 256, 1024)
BANDWIDTHS = (12.5e9, 50e9)  # bytes/s of a GPU between nodes: 100 and 400 Gbit/s
GLOBAL_BATCH = 2048
AT_ONCE = 4  # layers whose weights ZeRO 3 fetches by one message: 3.5 and 5 were counted
STAGES = {0: "0", 2: "1, 2", 3: "3"}
SMALL = 20  # messages of a few numbers in a step of stage 1, for D's BatchNorm most of them


class Link(Protocol):
    """How long messages take."""

    def seconds(self, kind: str, calls: float, size: float, ranks: int) -> float:
        """Seconds of so many messages of `size` bytes together."""
        ...


@dataclasses.dataclass(frozen=True)
class Measured:
    """Between ranks that have tried it: seconds per byte by kind, and of the smallest message."""

    rates: Mapping[str, float]
    latency: float

    def seconds(self, kind: str, calls: float, size: float, ranks: int) -> float:
        return self.rates.get(kind, self.rates[SUM]) * size + self.latency * calls


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of `gpus` GPUs. Bytes/s that a GPU sends `inside` a node and `between` nodes; seconds
    of a hop of a message, and of its `launch`. Sums go up and down a tree, all else around a ring,
    both at full bandwidth once the messages are long."""

    gpus: int = 8
    inside: float = 300e9
    between: float = 50e9
    hop_inside: float = 2e-6
    hop_between: float = 10e-6
    launch: float = 10e-6

    def seconds(self, kind: str, calls: float, size: float, ranks: int) -> float:
        nodes = math.ceil(ranks / self.gpus)
        bandwidth = self.inside if nodes == 1 else min(self.inside, self.between)
        if kind == SUM:
            inner = math.ceil(math.log2(min(ranks, self.gpus))) * self.hop_inside
            hops = 2 * (inner + math.ceil(math.log2(nodes)) * self.hop_between)
        else:
            hops = (ranks - nodes) * self.hop_inside + (nodes > 1) * nodes * self.hop_between
        return sent({kind: size}, ranks) / bandwidth + calls * (self.launch + hops)


def exposed(
    link: Link,
    messages: Messages,
    calls: Mapping[str, float],
    ranks: int,
    zero: int,
    hidden: float = 0.0,
) -> float:
    """Seconds of a step in which a rank does nothing but wait for messages.

    `hidden`: seconds of computing beside which messages can be sent: none of those of stage 0, of
    the sums of stages 1 and 2, and of all of stage 3.
    """
    spent = {
        kind: link.seconds(kind, calls.get(kind, 0), size, ranks) for kind, size in messages.items()
    }
    beside = {0: 0.0, 1: spent.get(SUM, 0.0), 2: spent.get(SUM, 0.0), 3: sum(spent.values())}[zero]
    return sum(spent.values()) - min(hidden, beside)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained, in which batches on each GPU: elements of the parameters of each network,
    how many layers have some that ZeRO 3 cuts up, how often it gathers them in a step, FLOP of an
    image, and small messages of a step."""

    name: str
    batches: Sequence[int]
    networks: Sequence[Sequence[int]]
    layers: Sequence[int]
    walks: Sequence[int]
    flop: float
    small: int

    def messages(self, zero: int, ranks: int) -> Messages:
        """Bytes of a step of one micro-batch, by kind."""
        engine = EngineConfig(zero=zero)
        pairs = zip(self.networks, self.walks, strict=True)
        return summed([expected(each, engine, ranks, walks=walks) for each, walks in pairs])


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU that attains so many FLOP/s in a step beside `fixed` seconds; the share `overlap` of
    what can be sent beside computing is; `noise`: the deviation of a step's time between GPUs, of
    it, the slowest of which all wait for."""

    attained: float
    fixed: float
    overlap: float
    noise: float

    def computing(self, work: Work, batch: float, ranks: int) -> float:
        """Seconds of computing in a step, of the slowest rank."""
        seconds = self.fixed + batch * work.flop / self.attained
        return seconds * (1 + self.noise * math.sqrt(2 * math.log(ranks)))


def step(
    work: Work, machine: Machine, cluster: Cluster, zero: int, ranks: int, batch: float
) -> float:
    """Seconds of a step with `batch` images on each GPU."""
    computing = machine.computing(work, batch, ranks)
    if ranks == 1:
        return computing
    messages = work.messages(zero, ranks)
    calls = {kind: math.ceil(size / (4 * BUCKET)) for kind, size in messages.items()}
    if zero == 3:
        pairs = zip(work.layers, work.walks, strict=True)
        gathered = sum(2 * layers * walks for layers, walks in pairs)
        calls[GATHER] = max(calls[GATHER], math.ceil(gathered / AT_ONCE))
    hidden = machine.overlap * computing * (1 if zero == 3 else BACKWARD)
    waiting = exposed(cluster, messages, calls, ranks, zero, hidden)
    return computing + waiting + cluster.seconds(SUM, work.small, 0.0, ranks)


@cache
def works() -> tuple[Work, Work]:
    """The paper's f16 VQGAN with its discriminator, and its largest transformer."""
    vqgan, loss = VQGANConfig(VectorQuantizerConfig(codes=16384, dim=256)), VQGANLossConfig()
    prior = TransformerConfig(
        16384, [16, 16], layers=48, heads=24, width=1536, condition=ClassCondition(1000)
    )
    assert loss.discriminator is not None
    with torch.device("meta"):
        first = [VQGAN(vqgan), build_discriminator(loss.discriminator, 3)]
        second = [Transformer(prior)]
    step_flop = flops.vqgan_step(vqgan, loss, 1, 256)
    return (
        work_of("VQGAN and D", (4, 16), first, (1, 4), step_flop, SMALL),
        work_of("Transformer", (16, 64), second, (1,), flops.prior_step(prior, 1), 0),
    )


def work_of(
    name: str,
    batches: Sequence[int],
    networks: Sequence[nn.Module],
    walks: Sequence[int],
    flop: float,
    small: int,
) -> Work:
    """The work on networks that may be on the meta device."""
    least = EngineConfig().persist_below
    sizes = [[p.numel() for p in network.parameters()] for network in networks]
    layers = [
        sum(any(p.numel() >= least for p in m.parameters(recurse=False)) for m in network.modules())
        for network in networks
    ]
    return Work(name, batches, sizes, layers, walks, flop, small)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fraction = cli.number(float, at_least=0, at_most=1)
    positive = cli.number(float, above=0)
    parser.add_argument("--attained", type=positive, nargs=2, default=[340.0, 400.0],
                        help="TFLOP/s of a GPU in a step of either stage")  # fmt: skip
    parser.add_argument("--fixed-ms", type=positive, default=10.0, help="of a step of any batch")
    parser.add_argument("--overlap", type=fraction, default=0.8, help="of sending and computing")
    parser.add_argument("--noise", type=fraction, default=0.01, help="deviation of a step's time")
    parser.add_argument("--into", type=Path, help="a document that has a place for the tables")


def run(arguments: argparse.Namespace) -> None:
    """Print the tables, or put them into a document."""
    text = tables(arguments)
    if arguments.into is None:
        print(text)
    else:
        write_into(arguments.into, text)


def tables(arguments: argparse.Namespace) -> str:
    """A table for each stage with the same batch on each GPU, and one with the same over all."""
    parts = []
    for work, attained in zip(works(), arguments.attained, strict=True):
        seconds = arguments.fixed_ms / 1e3
        machine = Machine(attained * 1e12, seconds, arguments.overlap, arguments.noise)
        parts += [weak(work, machine), strong(work, machine)]
    return "\n\n".join(parts)


def weak(work: Work, machine: Machine) -> str:
    """Milliseconds of a step by ranks, and what is left of the speed of one GPU."""
    head = [
        "images on each GPU",
        "between nodes",
        "ZeRO",
        *(cli.count(ranks, "GPU") for ranks in RANKS),
    ]
    lines = [f"{work.name}, {sum(map(sum, work.networks)) / 1e6:,.1f} M parameters, "
             f"{work.flop / 1e12:.2f} TFLOP an image: ms of a step (share of one GPU's speed).", "",
             f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]  # fmt: skip
    for batch in work.batches:
        for between in BANDWIDTHS:
            cluster = Cluster(between=between)
            for zero, name in STAGES.items():
                alone = step(work, machine, cluster, zero, 1, batch)
                each = [step(work, machine, cluster, zero, ranks, batch) for ranks in RANKS]
                cells = [f"{short(1e3 * s)} ({alone / s:.0%})" for s in each]
                row = [str(batch), f"{8 * between / 1e9:.0f} Gbit/s", name, *cells]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def strong(work: Work, machine: Machine) -> str:
    """Images a second by ranks where the global batch stays, and the share of perfect scaling."""
    head = ["between nodes", "ZeRO", *(cli.count(ranks, "GPU") for ranks in RANKS[1:])]
    lines = [f"{work.name}, {GLOBAL_BATCH:,} images in all: images/s (share of what 8 GPUs reach).",
             "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]  # fmt: skip
    for between in BANDWIDTHS:
        cluster = Cluster(between=between)
        for zero, name in STAGES.items():
            rates = [
                GLOBAL_BATCH / step(work, machine, cluster, zero, ranks, GLOBAL_BATCH / ranks)
                for ranks in RANKS[1:]
            ]
            cells = [
                f"{short(rate)} ({rate / rates[0] * RANKS[1] / ranks:.0%})"
                for rate, ranks in zip(rates, RANKS[1:], strict=True)
            ]
            lines.append(f"| {' | '.join([f'{8 * between / 1e9:.0f} Gbit/s', name, *cells])} |")
    return "\n".join(lines)
