"""What every first stage is built around: a VQGAN of any modality under its engine, without a loss.

Losses and step are those of the stages (`stages.vqgan`, `stages.label_maps`).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from taming_dist.data.reader import ImagesConfig
from taming_dist.errors import UserError
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.models.choice import configs
from taming_dist.models.modalities import MODALITIES
from taming_dist.models.networks import NETWORKS
from taming_dist.models.quantizers import VARIANTS
from taming_dist.models.vqgan import VQGAN, FirstStageConfig
from taming_dist.stages.codebook import CodebookUpdates
from taming_dist.stages.context import Context
from taming_dist.stages.images import open_images
from taming_dist.stages.interface import Config, Opened, Planned, Start, part
from taming_dist.stages.opening import initial_weights
from taming_dist.stages.trained import Trained, ValidationMetrics
from taming_dist.training.export import Export
from taming_dist.training.metrics import Metrics
from taming_dist.training.recipe import CODE_COUNTS, Measured, Pictures, Preview

# What every first stage has of config groups: networks, what they encode, and how codes are chosen.
FIRST_STAGE_SCHEMAS: Mapping[str, Mapping[str, type]] = {
    "model": NETWORKS,
    "model/quantizer": configs(VARIANTS),
    "model/modality": MODALITIES,
    "data": {"images": ImagesConfig},
}
Projections = Mapping[str, tuple[str, int]]  # see `VQGAN.add_projections`
NONE: Projections = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class OpenedAutoencoder(Opened):
    """With the weights of E, codebook and G to start from; None: random ones."""

    initial: Mapping[str, Tensor] | None = None


def open_autoencoder(config: Config, start: Start) -> OpenedAutoencoder:
    """Images as the modality reads them, and the weights of `start.init`.

    Raises:
        UserError: they are missing, or are not those of this configuration.
    """
    model = part(config.model, FirstStageConfig)
    same_codes = {"encoder", "quantizer"} <= set(config.train.freeze)
    initial = initial_weights(start.init, VQGAN, model, same_codes)
    return OpenedAutoencoder(open_images(config, start, [model.modality.column]), initial)


def plan_autoencoder(config: Config, projections: Projections = NONE) -> Planned:
    """E, codebook and G of a run that has not started, with projections for its losses; what is
    frozen of them has no gradient."""
    network = VQGAN(part(config.model, FirstStageConfig)).add_projections(projections)
    network.freeze(config.train.freeze)
    return Planned(network, averaged=True)


def other_loss(model: FirstStageConfig, given: str, fitting: str) -> UserError:
    """The error of a modality that goes with another loss."""
    return UserError(
        f"model.modality={model.modality.name} does not go with loss={given}: label maps are "
        f"trained with loss=labels, all else with loss=vqgan; use loss={fitting}"
    )


class CodebookMetrics(ValidationMetrics, Protocol):
    """Those that count codes [K], too."""

    @property
    def code_counts(self) -> Tensor: ...


class Autoencoder:
    """E, codebook and G: what they read of a batch, how they are measured and shown."""

    def __init__(
        self,
        model: FirstStageConfig,
        context: Context,
        initial: Mapping[str, Tensor] | None = None,
        projections: Projections = NONE,
    ) -> None:
        """`initial`: the weights of E, codebook and G to start from, instead of random ones;
        `projections`: those that losses need."""

        def make() -> VQGAN:
            return VQGAN(model).add_projections(projections)

        self.trained = Trained(VQGAN, model, context, initial, make=make)
        self.engine, self.world = self.trained.engine, context.world
        self.codebook = CodebookUpdates(self.engine, context)
        self.modality = model.modality

    def input(self, batch: Any) -> Tensor:
        """The network's input, on the device."""
        return self.modality.tensor(self.modality.take(batch.columns, self.world.device))

    def window_metrics(self) -> Metrics:
        """Those of the codebook and of the engine."""
        return self.codebook.window_metrics() | self.engine.window_metrics()

    def validate(self, batches: Iterable[tuple[Any, bool]], metrics: CodebookMetrics) -> Measured:
        """Metrics of inputs, reconstructions and codes, see `Trained.validate`; and as a curve how
        often each code was used (`CODE_COUNTS`)."""

        def measure(model: Any, batch: Any) -> tuple[Tensor, ...]:
            images = self.input(batch)
            out = model(images)
            return images, out.images, out.codes

        found = self.trained.validate(batches, metrics, measure)
        return {**found, CODE_COUNTS: metrics.code_counts.long().tolist()}

    @torch.no_grad()
    def pictures(self, batches: Iterable[tuple[Any, bool]]) -> Iterator[Pictures]:
        """Reconstructions and their inputs."""
        with self.engine.evaluated() as network:
            for batch, counts in batches:
                images = self.input(batch)
                with self.engine.autocast():
                    made = network(images).images
                if counts:
                    yield Pictures(self._shown(made), partial(self._shown, images), batch.ids)

    def _shown(self, images: Tensor) -> Tensor:
        """Images as they are looked at, uint8 [b,3,h,w]."""
        return to_uint8(self.modality.picture(images))

    @torch.no_grad()
    def preview(self, batch: Any) -> Preview:
        """Inputs above, their reconstructions below."""
        images = self.input(batch)
        with self.engine.evaluated() as network, self.engine.autocast():
            reconstructions = network(images).images
        pairs = torch.cat([self.modality.picture(part) for part in (images, reconstructions)])
        picture = image_grid(to_uint8(pairs), columns=len(images))
        return Preview(picture, ("validation images", "reconstructions"))

    def export(self) -> Export | None:
        """See `Trained.export`."""
        return self.trained.export()
