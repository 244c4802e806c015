"""The other half of stage 1: the discriminator D, its loss and what steadies it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.losses.adversarial import GAN_LOSSES, gradient_penalty, lecam
from taming_dist.losses.augmentation import DRAWS, POLICIES, diffaug
from taming_dist.models.discriminators import (
    DinoConfig,
    PatchGANConfig,
    accuracy,
    average_statistics,
    build_discriminator,
    initialize_actnorm,
    track_statistics,
)
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.adaptive import ADAPTIVE
from taming_dist.stages.interface import LossConfig
from taming_dist.stages.setup import Setup
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import mix
from taming_dist.training.recipe import Scalars

ORDERS = ("reused", "updated")


@dataclasses.dataclass
class VQGANLossConfig(LossConfig):
    """Weights of the terms and how the GAN is played; docs/losses.md explains each key.

    Steps are optimizer steps. The GAN counts from `disc_start` on, growing over `disc_ramp` steps;
    D is trained `disc_warmup` steps before that already. `discriminator` is a config of
    `taming_dist.models.discriminators`, or None for no GAN at all.
    """

    l1_weight: float = ranged(1.0, at_least=0)
    l2_weight: float = ranged(0.0, at_least=0)
    perceptual_weight: float = ranged(1.0, at_least=0)
    lpips_net: str = "vgg"
    lpips_weights: str = "pretrained"
    codebook_weight: float = ranged(1.0, at_least=0)
    gan: str = "hinge"
    discriminator: Any = MISSING
    disc_start: int = ranged(250_001, at_least=0)
    disc_warmup: int = ranged(0, at_least=0)
    disc_ramp: int = ranged(0, at_least=0)
    disc_weight: float = ranged(0.8, at_least=0)
    adaptive: str = "global"
    adaptive_min: float = ranged(0.0, at_least=0)
    adaptive_max: float = ranged(1e4, at_least=0)
    order: str = "reused"
    r1_weight: float = ranged(0.0, at_least=0)
    r1_every: int = ranged(16, at_least=1)
    lecam_weight: float = ranged(0.0, at_least=0)
    lecam_decay: float = ranged(0.999, at_least=0, below=1)
    augment: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")
        if self.discriminator == MISSING:  # built in Python, not by Hydra: the original's
            self.discriminator = PatchGANConfig()
        choose("loss.gan", self.gan, GAN_LOSSES)
        choose("loss.adaptive", self.adaptive, ADAPTIVE)
        choose("loss.order", self.order, ORDERS)
        for policy in self.augment:
            choose("loss.augment", policy, POLICIES)
        if self.adaptive_min > self.adaptive_max:
            raise UserError(
                f"loss.adaptive_min={self.adaptive_min}, loss.adaptive_max={self.adaptive_max}: "
                f"use adaptive_min <= adaptive_max"
            )
        if self.adaptive == "fixed" and not self.adaptive_min <= 1 <= self.adaptive_max:
            raise UserError(
                f"loss.adaptive_min={self.adaptive_min}, loss.adaptive_max={self.adaptive_max}: "
                f"loss.adaptive=fixed has no clamps, leave them out and set loss.disc_weight"
            )
        if self.r1_weight > 0 and isinstance(self.discriminator, DinoConfig):
            raise UserError(
                f"loss.r1_weight={self.r1_weight}: R1 is for discriminators that read images, not "
                f"for heads on frozen features; set it to 0"
            )

    def gan_weight(self, step: int) -> float:
        """What stands before the adaptive weight in a step: 0 while the GAN does not count."""
        if self.discriminator is None or step < self.disc_start:
            return 0.0
        return self.disc_weight * min(1.0, (step - self.disc_start + 1) / (self.disc_ramp + 1))

    def trains_discriminator(self, step: int) -> bool:
        """Whether D learns in a step."""
        return self.discriminator is not None and step >= self.disc_start - self.disc_warmup


def choose(key: str, value: str, known: Any) -> None:
    """UserError unless the value of a key is known."""
    if value not in known:
        raise UserError(f"{key}={value}: use {' or '.join(known)}")


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
        setup: Setup,
        image_channels: int,
        features: nn.Module | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """The trained network reads images, or the frozen `features` of them; `initial`: the
        weights to start from, instead of random ones."""
        self.loss, self.setup, self.world = loss, setup, setup.world
        self.gan = GAN_LOSSES[loss.gan]
        self.features = nn.Identity() if features is None else features.to(self.world.device)
        if loss.r1_weight > 0:  # ZeRO-3 lets go of the weights before they are needed again
            engine = dataclasses.replace(setup.engine, zero=min(setup.engine.zero, 2))
            setup = dataclasses.replace(setup, engine=engine)

        def make() -> nn.Module:
            return build_discriminator(loss.discriminator, image_channels)

        network = setup.build(make, mix(setup.seed, 0), initial)  # a seed of its own
        average = self.world.average()
        if average is not None:
            average_statistics(network, average)
        self.engine = setup.start(network)
        self._initialized = False
        self._averages: Tensor | None = None  # LeCAM's, over the steps so far

    def draws(self, clock: Clock) -> Sequence[Tensor]:
        """The augmentation's draws [b,DRAWS] for each micro-batch of an optimizer step.

        There is a row for every image of the global batch, so that they do not depend on how the
        batch is cut; rank r holds the rows r, r + R ...
        """
        randomness = torch.Generator().manual_seed(mix(self.setup.seed, clock.images, 1))
        draws = torch.rand(clock.global_batch, DRAWS, generator=randomness)
        mine = draws[self.world.rank :: self.world.world_size]
        return to_device(mine, self.world.device).split(self.setup.micro_batch)

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
            scalars["lecam"] = lecam(real, fake, self._averages)
            loss = loss + self.loss.lecam_weight * scalars["lecam"]
        self.engine.backward(loss)
        self.engine.step()
        said = torch.stack([scalars["logits_real"], scalars["logits_fake"]])
        return Judged(scalars, said.detach().float())

    def update(self, parts: Sequence[Judged]) -> None:
        """Move LeCAM's averages by what D said of the micro-batches of an optimizer step, over the
        whole global batch, unless the step was skipped."""
        if self.loss.lecam_weight > 0 and parts and self.engine.moved:
            said = self.world.mean(torch.stack([part.logits for part in parts]).mean(0))
            before = said if self._averages is None else self._averages
            self._averages = before.lerp(said, 1 - self.loss.lecam_decay)

    def state_dict(self) -> dict[str, Any]:
        return {"lecam": None if self._averages is None else self._averages.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state.get("lecam")
        self._averages = None if saved is None else torch.tensor(saved, device=self.world.device)

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
