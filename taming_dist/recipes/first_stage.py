"""What every first stage shares: a quantizing autoencoder under one engine.

The codebook's statistics, validation, previews and exports are here; losses and step are the
recipes' own (`recipes.vqgan`, `recipes.label_maps`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from taming_dist.engine.zero import Engine
from taming_dist.generation.pictures import sheet, to_uint8
from taming_dist.models.quantizers import Statistics
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.recipes.setup import Setup
from taming_dist.training.clock import Clock
from taming_dist.training.export import write_export
from taming_dist.training.metrics import CodeUsage
from taming_dist.training.optimization import mix, seed_step


class Figures(Protocol):
    """Sums over a validation set, and what follows from them (taming_dist/evaluation)."""

    sums: Tensor

    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None: ...
    def compute(self) -> dict[str, float]: ...


class FirstStageRecipe:
    """E, codebook and G of any modality, without a loss."""

    def __init__(
        self, model: VQGANConfig, setup: Setup, initial: Mapping[str, Tensor] | None = None
    ) -> None:
        """`initial`: the weights of E, codebook and G to start from, instead of random ones."""
        self.setup, self.world = setup, setup.world
        self.modality = model.modality
        torch.manual_seed(setup.seed)  # the same initial weights everywhere
        vqgan = VQGAN(model)
        if initial is not None:
            vqgan.load_state_dict(initial)
        vqgan.quantize.average = self.world.average()
        self.generator = setup.start(vqgan, ema_half_life=setup.optim.ema_half_life)
        self.usage = CodeUsage(model.vocabulary, self.world.device)
        self.revived = 0
        self.annealed: dict[str, float] = {}

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {"generator": self.generator}

    def _input(self, batch: Any) -> Tensor:
        """The network's input, on the device."""
        column = getattr(batch, self.modality.column)
        self.modality.check(column)
        return self.modality.tensor(column.to(self.world.device, non_blocking=True))

    def _begin_step(self, clock: Clock) -> None:
        """Seeds, learning rates and the quantizer's schedule."""
        seed_step(self.setup.seed, clock, self.world.rank)
        for engine in self.engines.values():
            engine.set_lr(self.setup.optim.learning_rate(clock))
        quantizer = self.generator.module.quantize
        self.annealed = quantizer.anneal(clock.images / clock.total_images)

    def _update_codebook(self, parts: list[Statistics], clock: Clock) -> None:
        """Bring the statistics of all micro-batches and ranks together, the same everywhere."""
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

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        figures = self._figures()
        figures.sums = figures.sums.to(self.world.device)
        with self.generator.evaluated() as network:
            for batch, counts in batches:
                images = self._input(batch)
                with self.generator.autocast():
                    out = network(images)
                if counts:
                    figures.update(images, out.images, out.codes)
        self.world.sum(figures.sums)
        return {name.removeprefix("val_"): value for name, value in figures.compute().items()}

    def _figures(self) -> Figures:
        """What is measured on the validation set."""
        raise NotImplementedError

    @torch.no_grad()
    def preview(self, batch: Any) -> Tensor:
        """Images above, their reconstructions below."""
        images = self._input(batch)
        with self.generator.evaluated() as network, self.generator.autocast():
            reconstructions = network(images).images
        pairs = torch.cat([self.modality.picture(part) for part in (images, reconstructions)])
        return sheet(to_uint8(pairs), columns=len(images))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self, folder: Path) -> None:
        state = self.generator.full_state()
        if state is not None:
            write_export(VQGAN, self.generator.module.config, state, folder)
