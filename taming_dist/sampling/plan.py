"""What a command asks for, checked and ready: pictures of any of its images.

This is where sampling (`generation`) and writing (the rest of this package) meet: a plan turns a
unit of images into finished pictures, one after the other, and a writer consumes them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.completion import Known, Watch
from taming_dist.generation.generator import Generator, Part
from taming_dist.generation.pictures import to_uint8
from taming_dist.generation.rejection import ALL, NO_CLASS, Rejection
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition, Columns, Condition, Request
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.classifier import open_classifier
from taming_dist.sampling.condition_pictures import condition_pictures
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.given import Given
from taming_dist.sampling.keeping import Kept, kept_pictures, unseen_note
from taming_dist.sampling.large import Large
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.request import IMAGES, parse_size, request_of
from taming_dist.sampling.units import Unit

Strips = Iterable[Tensor]


@dataclass(frozen=True)
class Plan:
    """The pictures of a request. Image k depends on the seed, its condition and k; `batch` of them
    are computed at a time, always the same ones together."""

    generator: Generator
    request: Request
    sampling: Sampling
    seed: int
    batch: int
    condition: Given | None = None
    kept: Kept | None = None
    rejection: Rejection = ALL
    large: Large | None = None

    @property
    def given(self) -> "tuple[Given | Kept, ...]":
        """The pictures that images are made of, in turn."""
        return tuple(each for each in (self.condition, self.kept) if each is not None)

    @property
    def notes(self) -> list[str]:
        """What the user should know before it begins."""
        note = "" if self.kept is None else unseen_note(self.kept, self.generator)
        return [note] if note else []

    def check(self) -> None:
        """Raise a UserError for what can be known before the first image is made."""
        first, last = range(min(self.batch, self.request.count)), self.request.images[-1:]
        for images in (last, first):
            columns, known = self.columns(images), self.known(images)
            prefix = self.asked.prefix(len(images), columns)
        if self.large is None:
            self.generator.stream(
                prefix, self.sampling, self.seed, self.batch, 0, known, self.rejection
            )
        else:
            self.large.steps(self.generator, columns, self.sampling, self.seed, images, known)

    @property
    def asked(self) -> Condition:
        """What the images are conditioned on."""
        return self.generator.condition(None if self.large is None else self.large.placement)

    @property
    def period(self) -> int:
        """After how many images what is given for them repeats; 1 where it does not."""
        longest = max((len(given) for given in self.given), default=1)
        return longest if longest > 1 else self.asked.period(self.request)

    def beside(self, image: int) -> list[Tensor]:
        """The pictures, uint8 [3, h, w], that an image was made of."""
        return [to_uint8(given.picture(image)) for given in self.given]

    def columns(self, images: range) -> Columns:
        """What the condition reads of some of the images."""
        return self.asked.requested(self.request.of(images))

    def known(self, images: range) -> Known | None:
        """What is known of some of the images; None if nothing is of any."""
        return None if self.kept is None else self.kept.known(images)

    def pictures(self, unit: Unit, watch: Watch | None = None) -> Iterator[Picture]:
        """Yield the pictures of a unit, in order; `watch` may look at them while their codes are
        written, and ends it by an exception."""
        images, columns = unit.images, self.columns(unit.images)
        classes = classes_of(columns, len(images))
        if self.large is None:
            found = self._parts(images, columns, watch)
        else:
            found = self._large_parts(self.large, unit, columns, watch)
        for index, class_id, (strips, score) in zip(images, classes, found, strict=True):
            facts: dict[str, Any] = {"class": class_id}
            facts |= {given.key: given.name(index) for given in self.given}
            if self.rejection.candidates > 1:
                facts |= {"candidates": self.rejection.candidates, "score": score}
            yield Picture(index, *self.size, strips, facts)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        if self.large is None:
            return self.generator.size
        factor = self.generator.vqgan.config.factor
        height, width = self.large.placement.image
        return height * factor, width * factor

    def _parts(
        self, images: range, columns: Columns, watch: Watch | None
    ) -> Iterator[tuple[Strips, float | None]]:
        """Yield the pixels and scores of images."""
        prefix, known = self.generator.prefix(len(images), columns or None), self.known(images)
        parts = self.generator.stream(
            prefix,
            self.sampling,
            self.seed,
            self.batch,
            images.start,
            known,
            self.rejection,
            watch,
        )
        for part in parts:
            for pixels, score in pictures_of(part):
                yield (pixels,), score

    def _large_parts(
        self, large: Large, unit: Unit, columns: Columns, watch: Watch | None
    ) -> Iterator[tuple[Strips, float | None]]:
        known = self.known(unit.images)
        written = large.codes(self.generator, columns, self.sampling, self.seed, unit, known, watch)
        for codes in written:
            yield large.strips(self.generator, codes, unit), None


def plan_of(config: SampleConfig, generator: Generator, encoder: VQGAN | None = None) -> Plan:
    """The plan of a command. `encoder`: the VQGAN of its condition, where it is open already.

    Raises:
        UserError: settings that these models cannot serve.
    """
    sampling = Sampling.of(config)
    size = parse_size(config.size)
    placement, shape = generator.placement(size, config.window_step), size or generator.size
    condition = condition_pictures(config, generator, shape, encoder)
    kept = kept_pictures(config, generator, shape)
    pictures = number_of(condition, kept)
    count = config.n or pictures
    request = request_of(config, generator.condition(placement), count, condition)
    rejection = rejection_of(config, generator)
    large, batch = None, config.batch
    if placement is not None:
        rejection.check_one()
        large = Large(placement, config.batch, config.window_memory, config.tile)
        batch = large.images
    elif config.tile is not None:
        raise UserError(
            f"tile: {config.tile} is for a size above the {shape[0]}x{shape[1]} that the "
            f"transformer has learned, leave it out"
        )
    plan = Plan(generator, request, sampling, config.seed, batch, condition, kept, rejection, large)
    plan.check()
    return plan


def number_of(condition: Given | None, kept: Kept | None) -> int:
    """How many images pictures are given for; `UserError` if they contradict each other."""
    counts = {len(each) for each in (condition, kept) if each is not None}
    if len(counts - {1}) > 1:
        raise UserError(
            f"image: it has {len(kept or ())} pictures and condition {len(condition or ())}: give "
            f"as many, one for each"
        )
    return max(counts, default=IMAGES)


def rejection_of(config: SampleConfig, generator: Generator) -> Rejection:
    """How many candidates there are for an image, and what chooses among them."""
    rejection = Rejection(config.acceptance)
    if rejection.candidates == 1:
        for name in ("classifier", "classifier_weights"):
            if getattr(config, name):
                raise UserError(
                    f"{name}: it chooses among candidates, and acceptance={config.acceptance} "
                    f"leaves one for each image: give acceptance=0.05, or leave {name} out"
                )
    if not config.classifier:
        if config.classifier_weights:
            raise UserError("classifier_weights: of which network? give classifier=resnet101")
        return rejection
    conditions = generator.transformer.condition.conditions
    known = [each.vocabulary for each in conditions if isinstance(each, ClassCondition)]
    if not known:
        raise UserError(NO_CLASS)
    device = generator.transformer.device
    classifier = open_classifier(config.classifier, config.classifier_weights, known[0], device)
    return Rejection(config.acceptance, classifier)


def classes_of(columns: Columns, count: int) -> list[int | None]:
    """The class of each of `count` images, or None."""
    classes: Tensor | None = columns.get("cls")
    return [None] * count if classes is None else classes.tolist()


def pictures_of(part: Part) -> Iterator[tuple[Tensor, float | None]]:
    """Yield the pixels of images, uint8 [3, h, w] on the CPU, and the score of each: None if it has
    none, or one that is not finite."""
    scores = [None] * len(part.images) if part.scores is None else part.scores.tolist()
    for pixels, score in zip(to_uint8(part.images).cpu(), scores, strict=True):
        yield pixels, None if score is None or not math.isfinite(score) else score
