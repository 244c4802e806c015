"""`+dry_run=true`, or `+dry_run=64` for 64 ranks: what a run would be, told without starting it.

The configuration is checked, its networks are built without memory (torch's meta device), and what
each rank would hold of them is counted. There is no process group, and nothing is written.
"""

from collections import Counter
from collections.abc import Iterator
from functools import reduce
from operator import add

import torch
from torch import nn

from taming_dist.cli import count
from taming_dist.config import check
from taming_dist.description import batch_line
from taming_dist.engine.footprint import FP32, Footprint, footprint
from taming_dist.errors import UserError
from taming_dist.stages import stage_of
from taming_dist.stages.interface import Config, Plan, Planned

GIB = 2**30
COLUMNS = ["weights", "gradients", "optimizer", "average", "buckets", "device", "host"]


def is_dry(config: Config) -> bool:
    """Whether the run is only to be told."""
    return config.dry_run is not None and config.dry_run is not False


def dry_run(config: Config, launched: int) -> str:
    """Return what is printed; `launched`: the ranks that this command was started with.

    Raises:
        UserError: the run could not start.
    """
    ranks = ranks_of(config, launched)
    batch, engine = check(config, ranks), config.engine
    with torch.device("meta"):
        plan = stage_of(config).plan(config)
    return "\n".join(
        [
            f"run       {config.run.name}: a dry run, nothing is started or written",
            *([f"scaled    {', '.join(config.scaled)}"] if config.scaled else []),
            *(f"note      {note}" for note in plan.notes),
            *(f"network   {name} {described(network)}" for name, network in plan.networks.items()),
            f"batch     {batch_line(batch)}",
            f"lr        {config.optim.peak(batch.global_batch):.3g} ({config.optim.schedule})",
            f"memory    GiB on each of {count(ranks, 'rank')}, {engine.precision}; activations are "
            f"not counted: they grow with data.micro_batch, here {batch.micro_batch}",
            *table(plan, config, ranks),
        ]
    )


def ranks_of(config: Config, launched: int) -> int:
    """The ranks that `dry_run` counts for: as many as were started, or the number given."""
    asked = config.dry_run
    if asked is True:
        return launched
    if not asked or asked < 1:
        raise UserError(f"dry_run={asked}: use true, or a number of ranks from 1")
    return asked


def described(network: Planned) -> str:
    """The parameters of a network, trained and frozen, and of its parts."""
    trained, frozen = sum(sizes(network.module, True)), sum(sizes(network.module, False))
    parts = ", ".join(f"{name} {millions(size)}" for name, size in parts_of(network.module).items())
    return f"{millions(trained)} trained, {millions(frozen)} frozen ({parts})"


def parts_of(module: nn.Module) -> Counter[str]:
    """Parameters by the part that they belong to; all tables of embeddings are one."""
    found: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        part = name.split(".")[0]
        found["embeddings" if part.endswith("_emb") else part] += parameter.numel()
    return found


def sizes(module: nn.Module, trained: bool) -> list[int]:
    """Elements of each parameter that is trained, or of each that is not."""
    return [p.numel() for p in module.parameters() if p.requires_grad == trained]


def millions(number: float) -> str:
    """A number of parameters as it is printed."""
    return f"{number / 1e6:,.3f} M"


def table(plan: Plan, config: Config, ranks: int) -> Iterator[str]:
    """What a rank holds at each stage of ZeRO, the configured one marked; `device` is the sum."""
    yield " " * 10 + "".join(f"{name:>11}" for name in COLUMNS)
    for zero in range(4):
        found = held(plan, config, zero, ranks)
        mark = ">" if zero == config.engine.zero else " "
        numbers = [getattr(found, name) / GIB for name in COLUMNS]
        yield f"  {mark} zero{zero} " + "".join(f"{number:11.3f}" for number in numbers)


def held(plan: Plan, config: Config, zero: int, ranks: int) -> Footprint:
    """What a rank holds of all networks at a stage of ZeRO; of frozen ones it has the whole."""
    found = []
    for network in plan.networks.values():
        engine = config.engine.at_stage(min(zero, network.largest_zero))
        averaged = network.averaged and config.optim.ema_half_life > 0
        if trained := sizes(network.module, True):
            found.append(footprint(trained, engine, ranks, averaged))
        frozen = FP32 * sum(sizes(network.module, False))
        found.append(Footprint(weights=frozen))
    return reduce(add, found)
