"""Stage 1 of a condition: a first stage for label maps. Source: the original's VQSegmentationModel.

A label map is one channel per class; E, codebook and G are those of the VQGAN, but the loss is the
binary cross-entropy of every channel, and there is no discriminator.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from taming_dist.evaluation.label_maps import LabelMapFigures
from taming_dist.losses.reconstruction import label_map_bce
from taming_dist.models.vqgan import Reconstruction, VQGANConfig
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.codebook import FirstStageRecipe
from taming_dist.stages.setup import Setup
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Scalars


@dataclasses.dataclass
class LabelMapLossConfig:
    """The weight of the codebook loss beside the cross-entropy."""

    codebook_weight: float = ranged(1.0, at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


class LabelMapRecipe(FirstStageRecipe):
    """Trains E, codebook and G on label maps."""

    def __init__(
        self,
        model: VQGANConfig,
        loss: LabelMapLossConfig,
        setup: Setup,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial`: as in `FirstStageRecipe`."""
        super().__init__(model, setup, initial)
        self.loss = loss

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step; yields the terms of each part."""
        self._begin_step(clock)
        statistics = []
        for batch in micro_batches:
            labels = self._input(batch)
            out: Reconstruction = self.generator(labels)
            bce = label_map_bce(labels, out.images)
            loss = bce + self.loss.codebook_weight * out.codebook_loss
            self.generator.backward(loss)
            self.generator.step()
            statistics.append(out.statistics)
            yield {"loss": loss.detach(), "bce": bce.detach(), "codebook": out.codebook_loss}
        self._update_codebook(statistics, clock)

    def _figures(self) -> LabelMapFigures:
        config = self.generator.module.config
        return LabelMapFigures(config.modality.classes, config.vocabulary)
