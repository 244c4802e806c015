"""What every first stage shares: a quantizing autoencoder under one engine.

The codebook's statistics and the previews are here; losses and step are of the stages
(`stages.vqgan`, `stages.label_maps`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taming_dist.generation.pictures import sheet, to_uint8
from taming_dist.models.quantizers import Statistics
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.setup import Setup
from taming_dist.stages.trained import ModelRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import CodeUsage
from taming_dist.training.optimization import mix


class FirstStageRecipe(ModelRecipe):
    """E, codebook and G of any modality, without a loss."""

    model_class = VQGAN
    engine_name = "generator"

    def __init__(
        self, model: VQGANConfig, setup: Setup, initial: Mapping[str, Tensor] | None = None
    ) -> None:
        """`initial`: the weights of E, codebook and G to start from, instead of random ones."""
        super().__init__(model, setup, initial)
        self.generator = self.engine
        self.generator.module.quantize.average = self.world.average()
        self.modality = model.modality
        self.usage = CodeUsage(model.vocabulary, self.world.device)
        self.revived = 0
        self.annealed: dict[str, float] = {}

    def _input(self, batch: Any) -> Tensor:
        """The network's input, on the device."""
        return self.modality.tensor(self.modality.take(batch.columns, self.world.device))

    def _begin_step(self, clock: Clock) -> None:
        """Seeds, learning rates and the quantizer's schedule."""
        super()._begin_step(clock)
        quantizer = self.generator.module.quantize
        self.annealed = quantizer.anneal(clock.images / clock.total_images)

    def _update_codebook(self, parts: list[Statistics], clock: Clock) -> None:
        """Bring the statistics of all micro-batches and ranks together, the same everywhere; those
        of a skipped step, whose latents may not be finite, are left out."""
        if not self.generator.moved:
            return
        counts = self.world.sum(torch.stack([part.counts for part in parts]).sum(0))
        sums = [part.sums for part in parts if part.sums is not None]
        candidates = [part.candidates for part in parts if part.candidates is not None]
        whole = Statistics(
            counts,
            self.world.sum(torch.stack(sums).sum(0)) if sums else None,
            self.world.join_samples(torch.cat(candidates)) if candidates else None,
        )
        self.usage.add(counts)
        randomness = torch.Generator().manual_seed(mix(self.setup.seed, clock.images))
        quantizer = self.generator.module.quantize
        self.revived += quantizer.update(whole, randomness, self.generator.replace_rows)

    def window_metrics(self) -> dict[str, float]:
        metrics = self.usage.take() | {"codebook_revived": float(self.revived)}
        metrics |= self.annealed | self.generator.window_metrics()
        self.revived = 0
        return metrics

    def _measured(self, model: Any, batch: Any) -> tuple[Tensor, ...]:
        """Images, their reconstructions and codes."""
        images = self._input(batch)
        out = model(images)
        return images, out.images, out.codes

    @torch.no_grad()
    def preview(self, batch: Any) -> Tensor:
        """Images above, their reconstructions below."""
        images = self._input(batch)
        with self.generator.evaluated() as network, self.generator.autocast():
            reconstructions = network(images).images
        pairs = torch.cat([self.modality.picture(part) for part in (images, reconstructions)])
        return sheet(to_uint8(pairs), columns=len(images))
