"""Pictures as a condition: `condition=photo.png`, whose codes the second VQGAN makes on the spot.

Source: arXiv 2012.09841, section 3.2 ("conditioned synthesis").
"""

from collections.abc import Mapping
from typing import Any

from taming_dist.data.images import Shape
from taming_dist.errors import UserError
from taming_dist.generation.generator import Generator
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.given import Given, are_pictures, paths_of

CODES = CodesCondition.name


def named_pictures(asked: Any) -> Any:
    """What of a condition, as it is typed, names pictures; None if nothing does."""
    place = asked.get(CODES) if isinstance(asked, Mapping) else asked
    return place if are_pictures(place) else None


def without_pictures(asked: Any) -> Any:
    """The rest of a condition that names pictures."""
    if not isinstance(asked, Mapping):
        return None
    return {name: own for name, own in asked.items() if name != CODES}


def condition_pictures(
    config: SampleConfig, generator: Generator, shape: Shape, encoder: VQGAN | None = None
) -> Given | None:
    """The pictures that images of a shape in pixels are conditioned on; None if none are given.
    `encoder`: their VQGAN, where it is `opened` already.

    Raises:
        UserError: the transformer cannot be conditioned on them, or their VQGAN is missing or
            another than that whose codes the transformer has learned.
    """
    place = named_pictures(config.condition)
    if place is None:
        if config.condition_vqgan:
            named = "null" if config.condition is None else config.condition
            raise UserError(
                f"condition_vqgan: it encodes pictures, and condition={named} names "
                f"none: give files or a folder of pictures (.png, .jpg, .webp), or leave it out"
            )
        return None
    paths = paths_of("condition", place)
    asked = generator.transformer.condition
    condition = next((each for each in asked.conditions if isinstance(each, CodesCondition)), None)
    if condition is None:
        raise UserError(
            f"condition: {paths[0]} is a picture, but this transformer is not conditioned on "
            f"pictures (model/condition={asked.name})"
        )
    if not config.condition_vqgan:
        raise UserError(
            f"condition: {paths[0]} is a picture, give condition_vqgan=EXPORT, the VQGAN that "
            f"encodes it"
        )
    vqgan = encoder or opened(config.condition_vqgan, condition)
    vqgan = vqgan.to(generator.transformer.device)
    return Given("condition", paths, vqgan, shape, scaled_shape(generator, condition, vqgan, shape))


def opened(export: str, condition: CodesCondition) -> VQGAN:
    """The VQGAN of an export; `UserError` if the condition has not learned its codes."""
    vqgan: VQGAN = VQGAN.from_pretrained(export)
    if vqgan.config.vocabulary != condition.vocabulary:
        raise UserError(
            f"condition_vqgan: its codebook has {vqgan.config.vocabulary} codes, but the "
            f"transformer's condition was learned with {condition.vocabulary}: give the VQGAN that "
            f"made its codes"
        )
    if condition.fingerprint and not vqgan.wrote(condition.fingerprint):
        raise UserError(
            f"condition_vqgan: its fingerprint is {vqgan.tokenizer_fingerprint}, but the "
            f"transformer's condition has codes of {condition.fingerprint}: give the VQGAN that "
            f"made its codes"
        )
    return vqgan.requires_grad_(False)


def scaled_shape(
    generator: Generator, condition: CodesCondition, vqgan: VQGAN, shape: Shape
) -> Shape:
    """The pixels in which the condition of images of a shape is encoded: they give codes of the
    condition's grid, or as many more as the images are larger than in training."""
    if shape != generator.size:
        learned, factor = generator.transformer.config.code_grid, generator.vqgan.config.factor
        condition = condition.enlarged(learned, (shape[0] // factor, shape[1] // factor))
    return vqgan.config.image_shape(condition.grid)
