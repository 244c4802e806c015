"""Stage 1 of a condition: a first stage for label maps. Source: the original's VQSegmentationModel.

A label map is one channel per class; E, codebook and G are those of the VQGAN, but the loss is the
binary cross-entropy of every channel, and there is no discriminator.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from taming_dist.evaluation.label_maps import LabelMapFigures
from taming_dist.losses.reconstruction import label_map_bce
from taming_dist.models.vqgan import Reconstruction, VQGANConfig
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.autoencoder import Autoencoder
from taming_dist.stages.setup import Setup
from taming_dist.stages.trained import begin_step
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Scalars


@dataclasses.dataclass
class LabelMapLossConfig:
    """The weight of the codebook loss beside the cross-entropy."""

    codebook_weight: float = ranged(1.0, at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


class LabelMapRecipe:
    """Trains E, codebook and G on label maps."""

    def __init__(
        self,
        model: VQGANConfig,
        loss: LabelMapLossConfig,
        setup: Setup,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial`: as in `Autoencoder`."""
        self.setup, self.world, self.loss = setup, setup.world, loss
        self.autoencoder = Autoencoder(model, setup, initial)
        self.generator = self.autoencoder.engine
        self.engines = {"generator": self.generator}

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step; yields the terms of each part."""
        begin_step(self.engines, self.setup, clock)
        self.autoencoder.codebook.anneal(clock)
        statistics = []
        for batch in micro_batches:
            labels = self.autoencoder.input(batch)
            out: Reconstruction = self.generator(labels)
            bce = label_map_bce(labels, out.images)
            loss = bce + self.loss.codebook_weight * out.codebook_loss
            self.generator.backward(loss)
            self.generator.step()
            statistics.append(out.statistics)
            yield {"loss": loss.detach(), "bce": bce.detach(), "codebook": out.codebook_loss}
        self.autoencoder.codebook.update(statistics, clock)

    def window_metrics(self) -> dict[str, float]:
        return self.autoencoder.window_metrics()

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        config = self.generator.module.config
        figures = LabelMapFigures(config.modality.classes, config.vocabulary)
        return self.autoencoder.validate(batches, figures)

    def preview(self, batch: Any) -> Tensor:
        return self.autoencoder.preview(batch)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self, folder: Path) -> None:
        self.autoencoder.export(folder)
