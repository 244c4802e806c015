"""What a command asks for, checked and ready: pictures of any of its images.

This is where sampling (`generation`) and writing (the rest of this package) meet: a plan turns a
unit of images into finished pictures, one after the other, and a writer consumes them.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from taming_dist.generation.generator import Generator
from taming_dist.generation.pictures import to_uint8
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import Columns, Request
from taming_dist.sampling.condition_pictures import condition_pictures
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.given import Given
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.request import IMAGES, parse_size, request_of
from taming_dist.sampling.units import Unit


@dataclass(frozen=True)
class Plan:
    """The pictures of a request. Image k depends on the seed, its condition and k; `batch` of them
    are computed at a time, always the same ones together."""

    generator: Generator
    request: Request
    sampling: Sampling
    seed: int
    batch: int
    given: tuple[Given, ...] = ()

    def check(self) -> None:
        """Raise a UserError for what can be known before the first image is made."""
        first, last = range(min(self.batch, self.request.count)), self.request.images[-1:]
        for images in (last, first):
            columns = self.columns(images)
            prefix = self.generator.prefix(len(images), columns or None)
        self.generator.stream(prefix, self.sampling, self.seed, self.batch)

    @property
    def period(self) -> int:
        """After how many images what is given for them repeats; 1 where it does not."""
        longest = max((len(given) for given in self.given), default=1)
        return longest if longest > 1 else self.generator.transformer.condition.period(self.request)

    def beside(self, image: int) -> list[Tensor]:
        """The pictures, uint8 [3, h, w], that an image was made of."""
        return [to_uint8(given.picture(image)) for given in self.given]

    def columns(self, images: range) -> Columns:
        """What the condition reads of some of the images."""
        return self.generator.transformer.condition.requested(self.request.of(images))

    def pictures(self, unit: Unit) -> Iterator[Picture]:
        """Yield the pictures of a unit, in order."""
        columns = self.columns(unit.images)
        facts = facts_of(columns, len(unit.images))
        prefix = self.generator.prefix(len(unit.images), columns or None)
        parts = self.generator.stream(
            prefix, self.sampling, self.seed, self.batch, unit.images.start
        )
        found = (pixels for part in parts for pixels in to_uint8(part.images).cpu())
        for index, pixels, own in zip(unit.images, found, facts, strict=True):
            yield Picture.whole(index, pixels, own)


def plan_of(config: SampleConfig, generator: Generator) -> Plan:
    """The plan of a command.

    Raises:
        UserError: settings that these models cannot serve.
    """
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    size = parse_size(config.size)
    generator.check_size(size)
    shape = size or generator.size
    pictures = condition_pictures(config, generator, shape)
    given = () if pictures is None else (pictures,)
    count = config.n or max((len(each) for each in given), default=IMAGES)
    request = request_of(config, generator.transformer.condition, count, pictures)
    plan = Plan(generator, request, sampling, config.seed, config.batch, given)
    plan.check()
    return plan


def facts_of(columns: Columns, count: int) -> list[dict[str, Any]]:
    """What is told of each of `count` images: its class, or null."""
    classes: Tensor | None = columns.get("cls")
    ids = [None] * count if classes is None else classes.tolist()
    return [{"class": class_id} for class_id in ids]
