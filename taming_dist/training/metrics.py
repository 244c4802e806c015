"""What training logs: numbers that stay on the device until a log point reads them all at once."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.engine.world import World

Number = TypeVar("Number")
Metrics = dict[str, float | Tensor]  # tensors are scalars on the device
LOSS = "loss"  # the scalar of every recipe whose ranks are told apart


def read(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """All numbers on the host: the one place where training waits for the device, and once."""
    there = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    here = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
    if there:
        found = torch.stack([value.double() for value in there.values()]).tolist()
        here |= dict(zip(there, found, strict=True))
    return {name: here[name] for name in metrics}


def prefixed(prefix: str, values: Mapping[str, Number]) -> dict[str, Number]:
    """{"rec": 1.0} -> {"train/rec": 1.0}."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


class Means:
    """Means over the scalars of every micro-batch since the last `take`, kept on the device."""

    def __init__(self) -> None:
        # by the names that come together: their sums [n], and behind them how often they came
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add_all(self, parts: Iterable[Mapping[str, Tensor]], moved: Tensor) -> None:
        """Take in the scalars of the micro-batches of an optimizer step, unless it was skipped:
        `moved` is a flag on the device. A name may be missing in some of them."""
        for values in parts:
            names = tuple(sorted(values))
            row = torch.stack([*(values[name].detach().float() for name in names), moved.float()])
            row = row.masked_fill(~moved, 0.0)
            self._sums[names] = self._sums[names] + row if names in self._sums else row

    def take(self, world: World) -> Metrics:
        """The means over all ranks, and start anew (collective); NaN where all was skipped."""
        means, _ = self.take_beside(world, {})
        return means

    def take_beside(
        self, world: World, own: Mapping[str, float]
    ) -> tuple[Metrics, dict[str, Tensor]]:
        """The same, and beside them, by the same collective, what each of the R ranks has for
        itself [R]: its `own` numbers, the same names on all, and its mean loss. Nothing of either
        where nothing was added."""
        if not self._sums:
            return {}, {}
        found = {}
        for name in sorted(set().union(*self._sums)):
            rows = [
                row[[names.index(name), -1]] for names, row in self._sums.items() if name in names
            ]
            total, count = torch.stack(rows).sum(0)
            found[name] = total / count
        self._sums = {}
        values = torch.stack(list(found.values()))
        told = to_device(torch.tensor([*own.values()], dtype=values.dtype), world.device)
        names = [*own]
        if LOSS in found:
            told, names = torch.cat([told, found[LOSS][None]]), [*names, LOSS]
        table = values.new_zeros(world.world_size, len(names))
        table[world.rank] = told
        sums = world.sum(torch.cat([values, table.flatten()]))
        means = sums[: len(values)] / world.world_size
        ranks = sums[len(values) :].view(table.shape).unbind(1)
        return dict(zip(found, means.unbind(), strict=True)), dict(zip(names, ranks, strict=True))


def totals(counts: Mapping[str, int], world: World) -> Metrics:
    """Sums over all ranks of what each has counted, the same names on all (collective)."""
    if not counts:
        return {}
    values = torch.tensor(list(counts.values()), dtype=torch.float64, device=world.device)
    return dict(zip(counts, world.sum(values).unbind(), strict=True))


class CodeUsage:
    """How the codebook is used, from counts of codes that are already summed over ranks."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, counts: Tensor) -> None:
        """Take in counts [K]."""
        self._counts = counts.double() if self._counts is None else self._counts + counts

    def take(self) -> Metrics:
        """Share of codes used and perplexity exp(entropy) since the last call, and start anew; NaN
        where nothing was counted."""
        counts, self._counts = self._counts, None
        if counts is None:
            return {}
        p = counts / counts.sum()
        entropy = -(p * p.clamp(min=1e-30).log()).sum()
        # NaN, too, of no counts
        used = (p > 0).double().mean() + 0 * entropy
        return {"codebook_usage": used, "codebook_perplexity": entropy.exp()}
