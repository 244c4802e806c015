"""Averages of training metrics between two log points, over all ranks, without a sync per step."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from taming_dist.engine.world import World


class Means:
    """Means over the scalars of every micro-batch since the last `take`, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in the scalars of one micro-batch; a name may be missing in some of them."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_all(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Take in the scalars of several micro-batches."""
        for values in parts:
            self.add(values)

    def take(self, world: World) -> dict[str, float]:
        """The means over all ranks, and start anew (collective; one reduction, one sync)."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        values = world.mean(means).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))


def totals(counts: Mapping[str, int], world: World) -> dict[str, float]:
    """Sums over all ranks of what each has counted, the same names on all (collective)."""
    if not counts:
        return {}
    values = torch.tensor(list(counts.values()), dtype=torch.float64, device=world.device)
    return dict(zip(counts, world.sum(values).tolist(), strict=True))


class CodeUsage:
    """How the codebook is used, from counts of codes that are already summed over ranks."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._counts = torch.zeros(vocabulary, dtype=torch.float64, device=device)

    def add(self, counts: Tensor) -> None:
        """Take in counts [K]."""
        self._counts += counts

    def take(self) -> dict[str, float]:
        """Share of codes used and perplexity exp(entropy) since the last call, and start anew."""
        counts, total = self._counts, self._counts.sum()
        self._counts = torch.zeros_like(counts)
        if total == 0:
            return {}
        p = counts / total
        entropy = -(p * p.clamp(min=1e-30).log()).sum()
        return {
            "codebook_usage": float((counts > 0).double().mean()),
            "codebook_perplexity": float(entropy.exp()),
        }
