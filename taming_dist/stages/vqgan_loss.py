"""What the VQGAN is trained for: the terms of its loss, and how the GAN is played."""

import dataclasses

from omegaconf import MISSING

from taming_dist.errors import UserError
from taming_dist.losses.adversarial import GAN_LOSSES
from taming_dist.losses.augmentation import POLICIES
from taming_dist.losses.terms import TERMS, L1Config, PerceptualConfig, TermConfig
from taming_dist.models.discriminators import DiscriminatorConfig, PatchGANConfig
from taming_dist.ranges import check_choice, check_ranges, ranged
from taming_dist.stages.adaptive import ADAPTIVE
from taming_dist.stages.interface import LossConfig

ORDERS = ("reused", "updated")


@dataclasses.dataclass
class VQGANLossConfig(LossConfig):
    """Weights of the terms and how the GAN is played; docs/losses.md explains each key.

    `terms` of the reconstruction loss, by the name under which each is logged. Steps are optimizer
    steps. The GAN counts from `disc_start` on, growing over `disc_ramp` steps; D is trained
    `disc_warmup` steps before that already. `discriminator` is None for no GAN at all.
    """

    terms: dict[str, TermConfig] = MISSING
    codebook_weight: float = ranged(1.0, at_least=0)
    gan: str = "hinge"
    discriminator: DiscriminatorConfig | None = MISSING
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
        if self.terms == MISSING:  # built in Python, not by Hydra: the original's
            self.terms = {"l1": L1Config(), "perceptual": PerceptualConfig()}
        if self.discriminator == MISSING:
            self.discriminator = PatchGANConfig()
        check_ranges(self, "loss")
        check_terms(self.terms)
        check_choice("loss.gan", self.gan, GAN_LOSSES)
        check_choice("loss.adaptive", self.adaptive, ADAPTIVE)
        check_choice("loss.order", self.order, ORDERS)
        for policy in self.augment:
            check_choice("loss.augment", policy, POLICIES)
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
        if self.r1_weight > 0 and self.discriminator and not self.discriminator.reads_images:
            raise UserError(
                f"loss.r1_weight={self.r1_weight}: R1 is for discriminators that read images, not "
                f"for heads on frozen features; set it to 0"
            )

    @property
    def largest_zero(self) -> int:
        """The ZeRO stage that D stays at: 3 lets go of the weights before R1 needs them again."""
        return 2 if self.r1_weight > 0 else 3

    def check_size(self, size: int) -> None:
        """UserError if images of so many pixels across do not suit a term or D."""
        for term in self.terms.values():
            term.check_size(size)
        if self.discriminator is not None:
            self.discriminator.check_size(size)

    def gan_weight(self, step: int) -> float:
        """What stands before the adaptive weight in a step: 0 while the GAN does not count."""
        if self.discriminator is None or step < self.disc_start:
            return 0.0
        return self.disc_weight * min(1.0, (step - self.disc_start + 1) / (self.disc_ramp + 1))

    def trains_discriminator(self, step: int) -> bool:
        """Whether D learns in a step."""
        return self.discriminator is not None and step >= self.disc_start - self.disc_warmup


def check_terms(terms: dict[str, TermConfig]) -> None:
    """UserError unless each term is in order and named after its kind, as l1 or l1_coarse are, so
    that what is logged under a name is what it says; and one has a weight."""
    kinds = {config: kind for kind, config in TERMS.items()}
    for name, term in terms.items():
        kind = kinds[type(term)]
        if name != kind and not name.startswith(f"{kind}_"):
            raise UserError(
                f"loss.terms.{name} is of the kind {kind}: name it {kind} or {kind}_..."
            )
        term.check(f"loss.terms.{name}")
    if not any(term.weight > 0 for term in terms.values()):
        raise UserError(
            "loss.terms: no term of the reconstruction loss has a weight above 0; give one, as in "
            "loss.terms.l1.weight=1"
        )
