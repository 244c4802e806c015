"""The models behind the page, and what its user can be asked for with them."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from taming_dist.app.config import DemoConfig
from taming_dist.data.images import Shape
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Manifest
from taming_dist.formats.names import printable
from taming_dist.generation.generator import Generator
from taming_dist.generation.window import check_windows
from taming_dist.models.modalities import Modality
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    Condition,
    CoordinatesCondition,
    TextCondition,
    Unconditional,
)
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.condition_pictures import opened

SERVED = (ClassCondition, CodesCondition, CoordinatesCondition, TextCondition, Unconditional)


@dataclass(frozen=True)
class Wants:
    """What the condition of a transformer asks of the user: one of `classes`, by their names, a
    text (`prompt`), a picture that `encoder` encodes; `several`: conditions have their names."""

    classes: tuple[str, ...] = ()
    prompt: bool = False
    encoder: VQGAN | None = None
    several: bool = False

    @property
    def picture(self) -> Modality | None:
        """The kind of the picture."""
        return None if self.encoder is None else self.encoder.config.modality


@dataclass(frozen=True)
class Models:
    """The VQGAN of the page, and the transformer and its condition's VQGAN, if they are given."""

    config: DemoConfig
    vqgan: VQGAN
    generator: Generator | None = None
    wants: Wants = field(default_factory=Wants)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.vqgan.quant_conv.weight.device

    @cached_property
    def can_enlarge(self) -> bool:
        """Whether the transformer can write pictures larger than it has learned."""
        if self.generator is None:
            return False
        rows, columns = self.generator.transformer.config.code_grid
        try:
            check_windows(self.generator.transformer)
            self.generator.transformer.condition.enlarged((rows, columns), (2 * rows, 2 * columns))
        except UserError:
            return False
        return True

    def whole(self, height: int, width: int) -> Shape:
        """The pixels in which the VQGAN shows a picture of these: its learned resolution on the
        short side, and on the other what the proportions say, up to four times that."""
        factor, short = self.vqgan.config.factor, self.vqgan.config.resolution
        scale = short / min(height, width)
        sides = (max(1, round(side * scale / factor)) * factor for side in (height, width))
        high, wide = (min(side, 4 * short // factor * factor) for side in sides)
        return high, wide


def load(config: DemoConfig) -> Models:
    """Return the models of a command, on a GPU if there is one.

    Raises:
        UserError: an export is missing, cannot be loaded, or does not fit the others.
    """
    if not config.vqgan:
        raise UserError("an export is missing: give vqgan=...")
    only = [
        name for name in ("condition_vqgan", "text_encoder", "classes") if getattr(config, name)
    ]
    if only and not config.transformer:
        raise UserError(
            f"{only[0]}: it is for a transformer: give transformer=..., or leave it out"
        )
    device = choose_device(0)
    vqgan = VQGAN.from_pretrained(config.vqgan).to(device).eval().requires_grad_(False)
    if not config.transformer:
        return Models(config, vqgan)
    transformer = Transformer.from_pretrained(config.transformer).to(device).eval()
    generator = Generator(transformer, vqgan, config.precision, config.compile)
    return Models(config, vqgan, generator, wants_of(transformer.condition, config))


def wants_of(condition: Condition, config: DemoConfig) -> Wants:
    """What a condition asks of the user.

    Raises:
        UserError: the page has no way to give that, or an export is missing for it.
    """
    parts, prompt, encoder = condition.conditions, False, None
    classes: tuple[str, ...] = ()
    for each in parts:
        if not isinstance(each, SERVED) or (
            isinstance(each, TextCondition) and not each.fingerprint
        ):
            raise UserError(
                f"transformer: the page cannot give what model/condition={each.name} asks for: use "
                f"python -m taming_dist.sample condition=..."
            )
        if isinstance(each, ClassCondition):
            classes = class_names(config.classes, each.vocabulary)
        if isinstance(each, TextCondition):
            prompt = True
        if isinstance(each, CodesCondition):
            if not config.condition_vqgan:
                raise UserError(
                    "condition_vqgan: the transformer is conditioned on pictures: give the export "
                    "of the VQGAN that encodes them"
                )
            encoder = opened(config.condition_vqgan, each)
    if config.condition_vqgan and encoder is None:
        raise UserError(
            f"condition_vqgan: the transformer is not conditioned on pictures "
            f"(model/condition={condition.name}), leave it out"
        )
    if config.text_encoder and not prompt:
        raise UserError("text_encoder: this transformer is not conditioned on text, leave it out")
    if config.classes and not classes:
        raise UserError("classes: this transformer is not conditioned on classes, leave it out")
    return Wants(classes, prompt, encoder, len(parts) > 1)


def class_names(folder: str, count: int) -> tuple[str, ...]:
    """What the user chooses among of so many classes: their ids, and behind them the names that the
    manifest of shards gives them.

    Raises:
        UserError: there are no names, or names of more classes.
    """
    ids = range(count)
    if not folder:
        return tuple(map(str, ids))
    manifest = Manifest.load(folder)
    named = manifest.details.get("class_names", manifest.classes)  # synsets have words beside them
    if not isinstance(named, list | tuple) or not named:
        raise UserError(
            f"classes: the shards of {folder} do not name their classes: give image or code shards "
            f"that do, or leave it out"
        )
    if len(named) > count:
        raise UserError(
            f"classes: {folder} names {len(named)} classes, but the transformer has learned "
            f"{count}: give the shards that it was trained on"
        )
    names = [f"{number}: {printable(str(name))}" for number, name in enumerate(named)]
    return (*names, *map(str, ids[len(names) :]))
