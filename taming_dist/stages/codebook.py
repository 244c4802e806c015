"""What a codebook needs once per optimizer step: its schedule, its statistics over all ranks."""

import torch
from torch import Tensor, nn

from taming_dist.engine.zero import Engine
from taming_dist.models.quantizers import Quantizer, Statistics
from taming_dist.stages.context import Context
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import CodeUsage, Metrics
from taming_dist.training.optimization import mix


class CodebookUpdates:
    """The quantizer of a first stage, kept the same on all ranks; counts how it is used. One that
    is frozen is in eval mode: nothing of it changes."""

    def __init__(self, engine: Engine, context: Context) -> None:
        self.engine, self.seed, self.world = engine, context.seed, context.world
        self.quantizer: Quantizer = engine.module.quantize
        self.quantizer.average = self.world.average()
        self.usage = CodeUsage()
        self.restarted = torch.zeros((), device=self.world.device)
        self.annealed: dict[str, float] = {}

    def anneal(self, clock: Clock) -> None:
        """Follow the quantizer's schedule."""
        if self.quantizer.training:
            self.annealed = self.quantizer.anneal(clock.images / clock.total_images)

    def update(self, parts: list[Statistics], clock: Clock) -> None:
        """Bring the statistics of all micro-batches and ranks together, the same everywhere; those
        of a skipped step, whose latents may not be finite, are left out."""
        moved = self.engine.moved
        counts = self.world.sum(torch.stack([part.counts for part in parts]).sum(0))
        sums = [part.sums for part in parts if part.sums is not None]
        candidates = [part.candidates for part in parts if part.candidates is not None]
        whole = Statistics(
            counts,
            self.world.sum(torch.stack(sums).sum(0)) if sums else None,
            self.world.join_samples(torch.cat(candidates)) if candidates else None,
        )
        self.usage.add(counts * moved)
        if not self.quantizer.training:
            return
        randomness = torch.Generator().manual_seed(mix(self.seed, clock.images))
        before = [(buffer, buffer.clone()) for buffer in self.quantizer.buffers()]

        def replace_rows(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
            self.engine.replace_rows(parameter, rows & moved, values)

        restarted = self.quantizer.update(whole, randomness, replace_rows)
        for buffer, kept in before:
            buffer.copy_(torch.where(moved, buffer, kept))
        self.restarted = self.restarted + restarted * moved

    def window_metrics(self) -> Metrics:
        """How the codebook was used since the last call, over all ranks."""
        metrics = self.usage.take() | {"codebook_revived": self.restarted} | self.annealed
        self.restarted = torch.zeros_like(self.restarted)
        return metrics
