"""How weights move: optimizer, learning rate and its schedule, all as functions of images seen."""

import dataclasses
import math

import torch

from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, ranged
from taming_dist.training.clock import Clock


@dataclasses.dataclass
class OptimConfig:
    """Adam or AdamW in torch's own implementation.

    Either `lr` (absolute) or `base_lr` (per image of the global batch, as the original) is given.
    `clip` is the largest gradient norm, 0 for none. `schedule` is constant, or cosine down to
    `final` times the peak; both after `warmup_images` of linear warm-up. `ema_half_life` images
    (0: none) is the half-life of the weights' moving average, which validation, previews and
    exports then use.
    """

    name: str = "adam"
    lr: float | None = ranged(None, at_least=0)
    base_lr: float | None = ranged(None, at_least=0)
    betas: list[float] = ranged([0.5, 0.9], at_least=0, below=1, length=2)
    weight_decay: float = ranged(0.0, at_least=0)
    clip: float = ranged(0.0, at_least=0)
    schedule: str = "constant"
    warmup_images: int = ranged(0, at_least=0)
    final: float = ranged(0.0, at_least=0, at_most=1)
    ema_half_life: int = ranged(0, at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self, "optim")
        if self.name not in ("adam", "adamw"):
            raise UserError(f"optim.name={self.name}: use adam or adamw")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"optim.schedule={self.schedule}: use constant or cosine")
        if (self.lr is None) == (self.base_lr is None):
            raise UserError(
                "give exactly one of optim.lr (absolute) and optim.base_lr (per image "
                "of the global batch); set the other to null"
            )

    def peak(self, global_batch: int) -> float:
        """The absolute learning rate that the schedule scales."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * global_batch

    def learning_rate(self, clock: Clock) -> float:
        """The learning rate of the next optimizer step."""
        return self.peak(clock.global_batch) * self._factor(clock.images, clock.total_images)

    def _factor(self, images: int, total: int) -> float:
        if images < self.warmup_images:
            return (images + 1) / (self.warmup_images + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (images - self.warmup_images) / max(1, total - self.warmup_images)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def seed_step(seed: int, clock: Clock, rank: int) -> None:
    """Seed torch for one optimizer step on one rank, so that a resumed run draws the same noise."""
    torch.manual_seed(mix(seed, clock.images, rank))


def mix(*parts: int) -> int:
    """One seed from several numbers (the finaliser of splitmix64, applied in turn)."""
    mask, state = 2**64 - 1, 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1  # torch takes signed 64-bit seeds
