"""Stage 1: the VQGAN. Source: arXiv 2012.09841, section 3.1, equations 4 to 7.

One step walks through every network once. The generator's graph is cut at the reconstruction x^:
each loss gives its gradient at x^, the adaptive weight comes from those two gradients and the
decoder's last convolution alone, and one backward pass takes their sum through G and E.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming_dist import pretrained
from taming_dist.data.reader import ImagesConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.errors import UserError
from taming_dist.evaluation.reconstruction import ReconstructionMetrics
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.reconstruction import ReconstructionLoss
from taming_dist.losses.terms import TERMS, PublishedConfig, TermConfig
from taming_dist.losses.terms.perceptual import Perceptual
from taming_dist.models.choice import configs
from taming_dist.models.discriminators import (
    DISCRIMINATORS,
    DinoConfig,
    build_discriminator,
    sees_batches,
)
from taming_dist.models.discriminators.dino import DinoFeatures
from taming_dist.models.modalities import RGB, LabelMap
from taming_dist.models.quick import run_plainly
from taming_dist.models.vqgan import (
    DECODER,
    LATENTS,
    VQGAN,
    FirstStageConfig,
    Reconstruction,
)
from taming_dist.stages.adaptive import ADAPTIVE
from taming_dist.stages.adversary import Adversary
from taming_dist.stages.autoencoder import (
    FIRST_STAGE_SCHEMAS,
    Autoencoder,
    OpenedAutoencoder,
    open_autoencoder,
    other_loss,
    plan_autoencoder,
)
from taming_dist.stages.context import Context
from taming_dist.stages.counting import vqgan_workload
from taming_dist.stages.interface import Config, Plan, Planned, Stage, Start, part
from taming_dist.stages.opening import discriminator_weights
from taming_dist.stages.trained import begin_step
from taming_dist.stages.vqgan_loss import VQGANLossConfig
from taming_dist.training.clock import Clock
from taming_dist.training.distances import Distances, open_distances
from taming_dist.training.export import Export
from taming_dist.training.metrics import Metrics
from taming_dist.training.recipe import Measured, Pictures, Preview, Scalars
from taming_dist.training.workload import Workload

__all__ = ["VQGANLossConfig", "VQGANRecipe", "VQGANStage"]


@dataclasses.dataclass(frozen=True)
class OpenedVQGAN(OpenedAutoencoder):
    """With the weights of the discriminator to start from, too; None: random ones."""

    initial_discriminator: Mapping[str, Tensor] | None = None


class VQGANStage(Stage[OpenedVQGAN]):
    """Photographs, depth maps and the like, with the losses of the paper."""

    network = VQGAN
    model = FirstStageConfig
    loss = VQGANLossConfig
    schemas = {
        **FIRST_STAGE_SCHEMAS,
        "loss": {"vqgan": VQGANLossConfig},
        "loss/terms": TERMS,
        "loss/discriminator": configs(DISCRIMINATORS),
    }
    distance_prefix = "r"

    def check(self, config: Config) -> None:
        """The image halves down to whole codes and suits the losses; so does the modality."""
        model, loss = part(config.model, FirstStageConfig), part(config.loss, VQGANLossConfig)
        size = part(config.data, ImagesConfig).size
        model.code_shape(size, size, "data.size")
        if isinstance(model.modality, LabelMap):
            raise other_loss(model, "vqgan", "labels")
        loss.check_size(size)
        for name, term in loss.terms.items():
            check_term(f"loss.terms.{name}", term, config.train.freeze)
        if loss.discriminator is not None:
            pretrained.check_frozen_features(loss.discriminator)
            loss.discriminator.check_channels(model.modality.channels)

    def compared(self, config: Config) -> Mapping[str, bool]:
        return ReconstructionMetrics.higher_is_better

    def distances(self, config: Config, opened: OpenedVQGAN, world: World) -> Distances | None:
        model = part(config.model, FirstStageConfig)
        if not config.train.evaluate_every or not isinstance(model.modality, RGB):
            return super().distances(config, opened, world)
        if config.train.evaluate_reference is not None:
            raise UserError(
                "train.evaluate_reference: reconstructions are compared with the images that they "
                "are of, leave it out"
            )
        return open_distances(config.train, opened.data, world, self.distance_prefix)

    def plan(self, config: Config) -> Plan:
        model, loss = part(config.model, FirstStageConfig), part(config.loss, VQGANLossConfig)
        reconstruction = ReconstructionLoss(loss.terms, pretrained.Blank())
        frozen: nn.Module = reconstruction
        networks = {"generator": plan_autoencoder(config, reconstruction.projections)}
        if (judge := loss.discriminator) is not None:
            trained = build_discriminator(judge, model.modality.channels)
            networks["discriminator"] = Planned(trained, largest_zero=loss.largest_zero)
            if isinstance(judge, DinoConfig):
                frozen = nn.ModuleList([frozen, DinoFeatures(judge.depths)])
        if any(True for _ in frozen.parameters()):
            networks["losses"] = Planned(frozen)
        return Plan(networks)

    def open_data(self, config: Config, start: Start) -> OpenedVQGAN:
        model, loss = part(config.model, FirstStageConfig), part(config.loss, VQGANLossConfig)
        opened, channels = open_autoencoder(config, start), model.modality.channels
        judge = discriminator_weights(start.init, loss.discriminator, channels)
        return OpenedVQGAN(opened.data, opened.initial, judge)

    def workload(self, config: Config, opened: OpenedVQGAN) -> Workload:
        model, loss = part(config.model, FirstStageConfig), part(config.loss, VQGANLossConfig)
        size = part(config.data, ImagesConfig).size
        return vqgan_workload(model, loss, size, config.train.freeze)

    def recipe(self, config: Config, opened: OpenedVQGAN, context: Context) -> "VQGANRecipe":
        model, loss = part(config.model, FirstStageConfig), part(config.loss, VQGANLossConfig)
        return VQGANRecipe(model, loss, context, opened.initial, opened.initial_discriminator)


class VQGANRecipe:
    """Trains E, codebook and G against a discriminator D."""

    def __init__(
        self,
        model: FirstStageConfig,
        loss: VQGANLossConfig,
        context: Context,
        initial: Mapping[str, Tensor] | None = None,
        initial_discriminator: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial`: as in `Autoencoder`; `initial_discriminator`: the same for D."""
        self.context, self.world, self.loss = context, context.world, loss
        self.reconstruction = ReconstructionLoss(loss.terms, pretrained).to(self.world.device)
        self.autoencoder = Autoencoder(model, context, initial, self.reconstruction.projections)
        self.generator = self.autoencoder.engine
        lpips = (m for m in self.reconstruction.modules() if isinstance(m, LPIPS))
        self.lpips = next(lpips, None)  # measures the validation set, too
        halves = context.engine.halves_losses(self.world.device)
        if halves:
            for term in self.reconstruction.terms:
                if isinstance(term, Perceptual):
                    term.run_in_half()
        if not context.engine.fast:
            run_plainly(self.reconstruction)
        self.adaptive = ADAPTIVE[loss.adaptive](
            self.world,
            loss.adaptive_min,
            loss.adaptive_max,
            torch.bfloat16 if halves else torch.float32,
        )
        self.adversary: Adversary | None = None
        if loss.discriminator is not None:
            features = pretrained.frozen_features(loss.discriminator)
            channels = model.modality.channels
            self.adversary = Adversary(loss, context, channels, features, initial_discriminator)

    @property
    def engines(self) -> Mapping[str, Engine]:
        found = {"generator": self.generator}
        if self.adversary is not None:
            found["discriminator"] = self.adversary.engine
        return found

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step of G and, in its turn, of D; yields the terms of each part."""
        begin_step(self.engines, self.context, clock)
        self.autoencoder.codebook.anneal(clock)
        gan_weight = self.loss.gan_weight(clock.step)
        adversary = self.adversary if self.loss.trains_discriminator(clock.step) else None
        draws = [] if adversary is None else adversary.draws(clock)
        statistics, weighed, judged = [], [], []
        for n, batch in enumerate(micro_batches):
            x = self.autoencoder.input(batch)
            out: Reconstruction = self.generator(x)
            y = leaf(out.images)
            projected = {name: leaf(made) for name, made in out.projected.items()}

            rec, scalars = self.reconstruction(x, y, projected)
            gradient, *others = self.generator.gradients_at(rec, y, *projected.values())
            loss = rec + self.loss.codebook_weight * out.codebook_loss
            if adversary is not None:
                shown = adversary.show(x, y if gan_weight > 0 else y.detach(), draws[n])
            if adversary is not None and gan_weight > 0:
                gan = adversary.generator_loss(shown)
                (gan_gradient,) = self.generator.gradients_at(gan, y)
                weighed.append(self.adaptive(out.features, gradient, gan_gradient))
                weight = gan_weight * weighed[-1].weight
                gradient = gradient + weight * gan_gradient
                loss = loss + weight * gan
                scalars |= {"gan_g": gan, "gan_weight": weight}
                scalars |= {"adaptive_weight": weighed[-1].weight}

            # its gradient at x^ is the sum above, at what terms look into that of rec;
            # its value means nothing
            surrogate = (out.images.float() * gradient).sum()
            for made, at_made in zip(out.projected.values(), others, strict=True):
                surrogate = surrogate + (made.float() * at_made).sum()
            surrogate = surrogate + self.loss.codebook_weight * out.codebook_loss
            self.generator.backward(surrogate, value=loss)
            self.generator.step()
            if adversary is not None:
                if self.loss.order == "updated":
                    shown = adversary.show_instead(shown, self._reconstructed(x))
                judged.append(adversary.step(shown, clock))
                scalars |= judged[-1].scalars

            statistics.append(out.statistics)
            yield scalars | {"loss": loss, "rec": rec, "codebook": out.codebook_loss}
        self.adaptive.update(weighed, self.generator.moved)
        if adversary is not None:
            adversary.update(judged)
        self.autoencoder.codebook.update(statistics, clock)

    @torch.no_grad()
    def _reconstructed(self, x: Tensor) -> Tensor:
        """What G makes of images after its update: what the original shows D."""
        with self.generator.autocast():
            return self.generator.module(x).images

    def depends_on_the_cut(self) -> str | None:
        found, adaptive = [], self.loss.adaptive
        if self.adversary is not None and adaptive not in ("lagged", "fixed"):
            lagged = "lagged takes it of the global batch"
            found.append(f"its adaptive weight (loss.adaptive={adaptive}; {lagged})")
        if self.adversary is not None and sees_batches(self.adversary.engine.module):
            found.append("its discriminator's batch statistics")
        if not found:
            return None
        return f"once the GAN is on, {' and '.join(found)} are of each micro-batch"

    def window_metrics(self) -> Metrics:
        metrics = self.autoencoder.window_metrics()
        if self.adversary is not None:
            judge = self.adversary.engine.window_metrics()
            metrics |= {f"disc_{name}": judge[name] for name in judge if name != "lr"}
        return metrics

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> Measured:
        vocabulary = self.generator.module.config.vocabulary
        metrics = ReconstructionMetrics(vocabulary, self.lpips, mean_colour=False)
        return self.autoencoder.validate(batches, metrics)

    def pictures(self, batches: Iterable[tuple[Any, bool]]) -> Iterator[Pictures]:
        return self.autoencoder.pictures(batches)

    def preview(self, batch: Any) -> Preview:
        return self.autoencoder.preview(batch)

    def export(self) -> Export | None:
        """With D beside, for runs that start from it (collective)."""
        found = self.autoencoder.export()
        judge = None if self.adversary is None else self.adversary.engine.full_state()
        return None if found is None else dataclasses.replace(found, discriminator=judge)

    def state_dict(self) -> dict[str, Any]:
        adversary = {} if self.adversary is None else self.adversary.state_dict()
        return self.adaptive.state_dict() | adversary

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adaptive.load_state_dict(state)
        if self.adversary is not None:
            self.adversary.load_state_dict(state)


def check_term(key: str, term: TermConfig, freeze: Sequence[str]) -> None:
    """UserError if a term lacks its network, or is about a part that stays as it is."""
    if isinstance(term, PublishedConfig):
        pretrained.check_timm_network(term.network, term.path, term.sha256)
    trained = {LATENTS: "encoder", DECODER: "decoder"}.get(term.looks_into)
    if trained in freeze and term.weight > 0:
        raise UserError(
            f"{key} is for the {trained}, which train.freeze=[{','.join(freeze)}] keeps as it is: "
            f"set {key}.weight=0"
        )


def leaf(made: Tensor) -> Tensor:
    """What a network made, in fp32, cut off from it: losses give their gradient there."""
    return made.detach().float().requires_grad_(True)
