"""What a run has to compute, and how fast its devices could: what its speed is a share of."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from taming_dist.engine.peak import TERA, Peak

GIGA = 1e9


def always(step: int) -> None:
    """All parts run in every step."""


@dataclass(frozen=True)
class Workload:
    """`parts`: FLOPs of training on one image, by what they are of, see `taming_dist.engine.flops`;
    `active`: which of them run in the optimizer step that follows so many (None: all)."""

    parts: Mapping[str, int]
    active: Callable[[int], Collection[str] | None] = always

    def flops(self, step: int) -> int:
        """FLOPs of an image in the optimizer step that follows so many."""
        active = self.active(step)
        return sum(part for name, part in self.parts.items() if active is None or name in active)

    def __str__(self) -> str:
        return ", ".join(f"{name} {flops / GIGA:,.3f}" for name, flops in self.parts.items())


@dataclass(frozen=True)
class Speed:
    """A workload on `devices` of the same `peak`."""

    workload: Workload
    peak: Peak
    devices: int

    def utilization(self, flops: float, seconds: float) -> float:
        """Model FLOPs utilization: the share of what the devices could have done in the time.
        Source: arXiv 2204.02311, appendix B."""
        return flops / (seconds * self.peak.flops * self.devices)

    def __str__(self) -> str:
        source = "its data sheet" if self.peak.known else "measured"
        return (
            f"GFLOP per image: {self.workload}; a device does {self.peak.flops / TERA:.3g} TFLOP/s "
            f"({source})"
        )
