"""By what recipe a probe trains its transformer, and the protocol of its figures, which has it."""

import dataclasses

from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.evaluation.config import EvaluateConfig
from taming_dist.evaluation.protocol import Measured, Protocol

BATCH, HEAD = 64, 64  # images of a step; width of a head
LR_WIDTH = 0.256  # the learning rate times the width, see `recipe_for`


@dataclasses.dataclass(frozen=True)
class ProbeRecipe:
    """How every tokenizer's transformer is trained: only figures of the same recipe compare.

    It is unconditional and without dropout, so that its figures depend neither on classes nor on
    the number of ranks. `images` are those that it sees, some of them again where there are fewer;
    they are read in as many lanes as a `batch` has images, and in blocks of `reading_block` (see
    `taming_dist.data.order`). `seed` is of weights, order and samples.
    """

    layers: int
    width: int
    heads: int
    images: int
    warmup_images: int
    lr: float
    seed: int = 0
    precision: str = "fp32"
    batch: int = BATCH
    block: str = "llama"
    order: str = "raster"
    scheme: str = "next_index"
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: str = "cosine"
    final: float = 0.05
    reading_block: int = 256


def recipe_for(config: EvaluateConfig) -> ProbeRecipe:
    """The recipe of the sizes that a command asks for. The learning rate falls with the width, as
    that of Adam has to for hidden layers (arXiv 2203.03466, table 3).

    Raises:
        UserError: a size that heads or steps do not divide.
    """
    for key, unit in (("probe_width", HEAD), ("probe_images", BATCH)):
        if (value := getattr(config, key)) % unit:
            nearest = max(1, round(value / unit)) * unit
            raise UserError(f"{key}={value} is not a multiple of {unit}: use {key}={nearest}")
    return ProbeRecipe(
        layers=config.probe_layers,
        width=config.probe_width,
        heads=config.probe_width // HEAD,
        images=config.probe_images,
        warmup_images=config.probe_images // 20,
        lr=LR_WIDTH / config.probe_width,
        seed=config.seed,
        precision=config.precision,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeProtocol(Protocol):
    """What a probe's figures depend on beside the tokenizer. Of those of codes `reference` is the
    fingerprint of the images that these were made of, not of the codes. `training`,
    `training_images` and `training_crop`: the same of those that the transformer was trained on."""

    training: str
    training_images: int
    training_crop: str
    recipe: ProbeRecipe


@dataclasses.dataclass(frozen=True)
class Probed:
    """Figures `probe_...` of a transformer that was trained on codes by a recipe."""

    measured: Measured
    train: CodeDataset
    recipe: ProbeRecipe

    def add(self, name: str, value: float, found_by: Protocol) -> None:
        """Take in a figure by how it would have been found of a given transformer."""
        self.measured.add({f"probe_{name}": value}, self.protocol(found_by))

    def protocol(self, found_by: Protocol) -> ProbeProtocol:
        """Under which conditions it was found, training included."""
        return ProbeProtocol(
            **vars(found_by),
            training=self.train.origin.fingerprint,
            training_images=self.train.num_samples,
            training_crop=self.train.origin.views,
            recipe=self.recipe,
        )
