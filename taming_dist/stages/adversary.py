"""The other half of stage 1: the discriminator D, its loss and what steadies it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taming_dist.copies import to_device
from taming_dist.losses.adversarial import GAN_LOSSES, gradient_penalty, lecam
from taming_dist.losses.augmentation import DRAWS, diffaug
from taming_dist.models.discriminators import (
    accuracy,
    average_statistics,
    build_discriminator,
    initialize_actnorm,
    track_statistics,
)
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan_loss import VQGANLossConfig
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import mix
from taming_dist.training.recipe import Scalars


@dataclasses.dataclass(frozen=True)
class Shown:
    """A micro-batch and its reconstructions as the trained network of D reads them: under the same
    augmentation, through the frozen features where there are any. `draws`: the augmentation's."""

    real: Tensor
    fake: Tensor
    draws: Tensor


@dataclasses.dataclass(frozen=True)
class Judged:
    """What D's step gives for a micro-batch; `logits` [2]: its mean logits, real and fake."""

    scalars: Scalars
    logits: Tensor


class Adversary:
    """D under its own engine: its loss for G, and its own step. What it keeps over optimizer steps
    are LeCAM's averages."""

    def __init__(
        self,
        loss: VQGANLossConfig,
        context: Context,
        image_channels: int,
        features: nn.Module | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """The trained network reads images, or the frozen `features` of them; `initial`: the
        weights to start from, instead of random ones."""
        self.loss, self.context, self.world = loss, context, context.world
        self.gan = GAN_LOSSES[loss.gan]
        self.features = nn.Identity() if features is None else features.to(self.world.device)
        zero = min(context.engine.zero, loss.largest_zero)
        context = dataclasses.replace(context, engine=context.engine.at_stage(zero))

        config = loss.discriminator
        assert config is not None, "without a discriminator there is no adversary"

        def make() -> nn.Module:
            return build_discriminator(config, image_channels)

        network = context.build(make, mix(context.seed, 0), initial)  # a seed of its own
        average = self.world.average()
        if average is not None:
            average_statistics(network, average)
        self.engine = context.start(network)
        self._initialized = False
        # LeCAM's, over the steps so far, and whether one of these was not skipped
        self._averages: Tensor | None = None
        self._known = torch.zeros((), dtype=torch.bool, device=self.world.device)

    def draws(self, clock: Clock) -> Sequence[Tensor]:
        """The augmentation's draws [b,DRAWS] for each micro-batch of an optimizer step.

        There is a row for every image of the global batch, so that they do not depend on how the
        batch is cut; rank r holds the rows r, r + R ...
        """
        randomness = torch.Generator().manual_seed(mix(self.context.seed, clock.images, 1))
        draws = torch.rand(clock.global_batch, DRAWS, generator=randomness)
        mine = draws[self.world.rank :: self.world.world_size]
        return to_device(mine, self.world.device).split(self.context.micro_batch)

    def show(self, x: Tensor, y: Tensor, draws: Tensor) -> Shown:
        """Images x and reconstructions y [b,c,h,w] as D sees them; y may require a gradient."""
        return Shown(self._prepared(x, draws), self._prepared(y, draws), draws)

    def show_instead(self, shown: Shown, y: Tensor) -> Shown:
        """The same images beside other reconstructions y of them."""
        return dataclasses.replace(shown, fake=self._prepared(y, shown.draws))

    def generator_loss(self, shown: Shown) -> Tensor:
        """How well the reconstructions fool D, which only looks: it collects no gradient, and its
        running statistics stand still."""
        self._initialize(shown.real)
        with self._looking(), self.engine.autocast():
            return self.gan.generator(self.engine.module(shown.fake))

    def step(self, shown: Shown, clock: Clock) -> Judged:
        """Train D on a micro-batch; no gradient goes to the reconstructions."""
        self._initialize(shown.real)
        real, fake = self.engine(shown.real), self.engine(shown.fake.detach())
        loss = self.gan.discriminator(real, fake)
        scalars = {
            "gan_d": loss,
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
            "disc_accuracy": accuracy(real, fake),
        }
        if self.loss.r1_weight > 0 and clock.step % self.loss.r1_every == 0:
            scalars["r1"] = self._gradient_penalty(shown.real)
            # as if it were there in every step
            loss = loss + self.loss.r1_weight * self.loss.r1_every * scalars["r1"]
        if self.loss.lecam_weight > 0 and self._averages is not None:
            # nothing where all steps of D so far were skipped
            scalars["lecam"] = lecam(real, fake, self._averages) * self._known
            loss = loss + self.loss.lecam_weight * scalars["lecam"]
        self.engine.backward(loss)
        self.engine.step()
        said = torch.stack([scalars["logits_real"], scalars["logits_fake"]])
        return Judged(scalars, said.detach().float())

    def update(self, parts: Sequence[Judged]) -> None:
        """Move LeCAM's averages by what D said of the micro-batches of an optimizer step, over the
        whole global batch, unless the step was skipped."""
        if self.loss.lecam_weight == 0 or not parts:
            return
        moved, before = self.engine.moved, self._averages
        said = self.world.mean(torch.stack([part.logits for part in parts]).mean(0))
        before = torch.zeros_like(said) if before is None else before
        first = torch.where(self._known, before, said)
        self._averages = torch.where(moved, first.lerp(said, 1 - self.loss.lecam_decay), before)
        self._known = self._known | moved

    def state_dict(self) -> dict[str, Any]:
        averages = self._averages
        return {"lecam": None if averages is None or not self._known else averages.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state.get("lecam")
        self._averages = None if saved is None else torch.tensor(saved, device=self.world.device)
        self._known.fill_(saved is not None)

    def _initialize(self, real: Tensor) -> None:
        """Set ActNorm from the first images that D sees."""
        if self._initialized:
            return
        with self._looking():
            initialize_actnorm(self.engine.module, real, self.engine.assign)
        self._initialized = True

    def _gradient_penalty(self, real: Tensor) -> Tensor:
        """R1 in fp32, past the engine, whose output cannot be differentiated twice."""
        images = real.detach().requires_grad_(True)
        with self._looking():
            return gradient_penalty(self.engine.module(images), images)

    def _prepared(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images as the trained network reads them."""
        augmented = diffaug(images.float(), draws, self.loss.augment)
        with self.engine.autocast():
            return self.features(augmented)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        track_statistics(self.engine.module, False)
        yield
        track_statistics(self.engine.module, True)
