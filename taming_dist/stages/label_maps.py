"""Stage 1 of a condition: a first stage for label maps. Source: the original's VQSegmentationModel.

A label map is one channel per class; E, codebook and G are those of the VQGAN, but the loss is the
binary cross-entropy of every channel, and there is no discriminator.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from taming_dist.data.reader import ImagesConfig
from taming_dist.evaluation.label_maps import LabelMapMetrics
from taming_dist.losses.reconstruction import label_map_bce
from taming_dist.models.modalities import LabelMap
from taming_dist.models.vqgan import VQGAN, FirstStageConfig, Reconstruction
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.autoencoder import (
    FIRST_STAGE_SCHEMAS,
    Autoencoder,
    OpenedAutoencoder,
    open_autoencoder,
    other_loss,
    plan_autoencoder,
)
from taming_dist.stages.context import Context
from taming_dist.stages.counting import generator_workload
from taming_dist.stages.interface import Config, LossConfig, Plan, Stage, Start, part
from taming_dist.stages.trained import begin_step
from taming_dist.training.clock import Clock
from taming_dist.training.export import Export
from taming_dist.training.metrics import Metrics
from taming_dist.training.recipe import Measured, Pictures, Preview, Scalars
from taming_dist.training.workload import Workload


@dataclasses.dataclass
class LabelMapLossConfig(LossConfig):
    """The weight of the codebook loss beside the cross-entropy."""

    codebook_weight: float = ranged(1.0, at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


class LabelMapStage(Stage[OpenedAutoencoder]):
    """Label maps: one channel per class, cross-entropy, no discriminator."""

    network = VQGAN
    model = FirstStageConfig
    loss = LabelMapLossConfig
    schemas = {**FIRST_STAGE_SCHEMAS, "loss": {"labels": LabelMapLossConfig}}

    def check(self, config: Config) -> None:
        model = part(config.model, FirstStageConfig)
        size = part(config.data, ImagesConfig).size
        model.code_shape(size, size, "data.size")
        if not isinstance(model.modality, LabelMap):
            raise other_loss(model, "labels", "vqgan")

    def compared(self, config: Config) -> Mapping[str, bool]:
        return LabelMapMetrics.higher_is_better

    def plan(self, config: Config) -> Plan:
        return Plan({"generator": plan_autoencoder(config)})

    def open_data(self, config: Config, start: Start) -> OpenedAutoencoder:
        return open_autoencoder(config, start)

    def workload(self, config: Config, opened: OpenedAutoencoder) -> Workload:
        size = part(config.data, ImagesConfig).size
        return generator_workload(part(config.model, FirstStageConfig), size, config.train.freeze)

    def recipe(
        self, config: Config, opened: OpenedAutoencoder, context: Context
    ) -> "LabelMapRecipe":
        model, loss = part(config.model, FirstStageConfig), part(config.loss, LabelMapLossConfig)
        return LabelMapRecipe(model, loss, context, opened.initial)


class LabelMapRecipe:
    """Trains E, codebook and G on label maps."""

    def __init__(
        self,
        model: FirstStageConfig,
        loss: LabelMapLossConfig,
        context: Context,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial`: as in `Autoencoder`."""
        self.context, self.world, self.loss = context, context.world, loss
        self.autoencoder = Autoencoder(model, context, initial)
        self.generator = self.autoencoder.engine
        self.engines = {"generator": self.generator}

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step; yields the terms of each part."""
        begin_step(self.engines, self.context, clock)
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

    def depends_on_the_cut(self) -> str | None:
        return None

    def window_metrics(self) -> Metrics:
        return self.autoencoder.window_metrics()

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> Measured:
        config = self.generator.module.config
        metrics = LabelMapMetrics(config.modality.classes, config.vocabulary)
        return self.autoencoder.validate(batches, metrics)

    def pictures(self, batches: Iterable[tuple[Any, bool]]) -> Iterator[Pictures]:
        return self.autoencoder.pictures(batches)

    def preview(self, batch: Any) -> Preview:
        return self.autoencoder.preview(batch)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self) -> Export | None:
        return self.autoencoder.export()
