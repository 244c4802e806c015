"""From a trained pair of exports to images: the transformer writes codes, the VQGAN decodes them.

Source: arXiv 2012.09841, sections 3.2 and 4.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.generation.captured import Captured
from taming_dist.generation.completion import Known, Watch
from taming_dist.generation.draws import uniforms
from taming_dist.generation.placement import Placement, check_sides
from taming_dist.generation.precision import PRECISIONS, in_bf16
from taming_dist.generation.rejection import ALL, Classifier, Rejection, best_of
from taming_dist.generation.sampler import Sampler
from taming_dist.generation.sampling import Sampling
from taming_dist.generation.tiles import decode_pictures, picture_tiles
from taming_dist.generation.window import check_windows, write_codes
from taming_dist.models.prior.conditions import Columns, Condition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import NextScale
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import MultiScaleConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.ranges import check_choice

Step = TypeVar("Step")


class Samples(NamedTuple):
    """Generated images [b, 3, h, w] in [-1, 1] (maps in colours) and their codes [b, *shape]."""

    images: Tensor
    codes: Tensor


class Part(NamedTuple):
    """Some of the images that were asked for, see `Samples`, and the scores [b] fp64 by which they
    were chosen from their candidates; None where there were none."""

    images: Tensor
    codes: Tensor
    scores: Tensor | None


class Generator:
    """A transformer and the VQGAN whose codes it has learned, both on one device.

    `precision`: fp32, or bf16 for a copy `sampled` of the transformer. On a GPU the step of a token
    is recorded in a CUDA graph; `compile` has torch.compile make fewer kernels of it before, which
    takes a minute or more.

    Raises:
        UserError: the transformer was trained on codes of another VQGAN.
    """

    def __init__(
        self,
        transformer: Transformer,
        vqgan: VQGAN,
        precision: str = "fp32",
        compile: bool = False,
    ) -> None:
        check_pair(transformer, vqgan)
        check_choice("precision", precision, PRECISIONS)
        self.transformer = transformer
        self.sampled = in_bf16(transformer) if precision == "bf16" else transformer
        self.vqgan = vqgan
        self.compile = compile
        self._sampler: Sampler | None = None

    def sample(
        self,
        n: int | None = None,
        condition: Any = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 1.0,
        batch: int = 16,
        steps: int | None = None,
        choice_temperature: float | None = None,
        known: Known | None = None,
        acceptance: float = 1.0,
        classifier: Classifier | None = None,
        window_step: int = 1,
        window_memory: float = 2.0,
        tile: int | None = None,
    ) -> Samples:
        """Return n images [n, 3, h, w] in [-1, 1] and their codes [n, *shape], on one device.

        `condition` is what `prefix` takes, and stands in for n; `size` is (h, w)
        in pixels. Image k depends on the seed, its condition and k; `batch`, images at a time,
        bounds the memory only. What is `known` of images, which the n take in turn, they keep.
        `acceptance` and `classifier` are those of `Rejection`, the other settings of `Sampling`.

        A size above the learned one is written through a window (`window.write_codes`) that moves
        by `window_step` codes, and is given the condition of the whole image; `batch` is then
        windows at a time, and `window_memory` GiB for what they keep. `tile`: the rows of pixels
        that are decoded at a time, 0 all, None as many as `tiles.tile_rows` says.

        Raises:
            UserError: a count, class, size or setting that these models cannot serve.
        """
        placement = self.placement(size, window_step)
        sampling = Sampling(
            temperature,
            top_k,
            top_p,
            guidance,
            guidance_schedule,
            guidance_power,
            steps,
            choice_temperature,
        )
        if n is None and condition is None and known is not None:
            n = len(known)
        rejection = Rejection(acceptance, classifier)
        if placement is not None:
            rejection.check_one()
            columns, count = self.columns(n, condition, placement)
            start = Known.nothing(count, placement.image) if known is None else known.in_turn(count)
            *_, last = self.windows(columns, start, placement, sampling, seed, batch, window_memory)
            pictures = [self.pictures(codes[None], tile) for codes in last.codes]  # one by one
            return Samples(torch.cat(pictures), last.codes)
        prefix = self.prefix(n, condition)
        parts = list(self.stream(prefix, sampling, seed, batch, 0, known, rejection))
        return Samples(
            torch.cat([part.images for part in parts]), torch.cat([part.codes for part in parts])
        )

    def stream(
        self,
        prefix: Prefix,
        sampling: Sampling,
        seed: int = 0,
        batch: int = 16,
        first: int = 0,
        known: Known | None = None,
        rejection: Rejection = ALL,
        watch: Watch | None = None,
    ) -> Iterator[Part]:
        """Yield the images of n prefixes in order, at most `batch` at a time, as `sample` does;
        they are the seed's images from number `first` on. `known` is of them in turn. `watch` is
        called after each step of those that are written together.

        Raises:
            UserError: a setting or a batch that these models cannot serve; before the first image.
        """
        self._check(sampling, batch)
        if known is not None:
            known.check(self.transformer.config.code_shape, self.transformer.config.vocabulary)
            known = known.in_turn(len(prefix))
        if rejection.candidates > 1:
            rejection.check(self.transformer)
        parts = (slice(at, at + batch) for at in range(0, len(prefix), batch))
        return (
            self._images(
                prefix.rows(part),
                first + part.start,
                sampling,
                seed,
                None if known is None else known.rows(part),
                rejection,
                watch,
            )
            for part in parts
        )

    def prefix(self, n: int | None = None, condition: Any = None) -> Prefix:
        """Return the prefixes of n images, on the models' device.

        `condition`: what the transformer's condition takes, class ids [n], codes [n, *shape], crops
        [n, 5] or n layouts of objects; or its columns by name; or, for several, what each takes by
        its name.

        Raises:
            UserError: neither is given, they contradict each other, or a class or code is unknown.
        """
        columns, count = self.columns(n, condition)
        return self.transformer.condition.prefix(count, columns).to(self.transformer.device)

    def columns(
        self, n: int | None, condition: Any, placement: Placement | None = None
    ) -> tuple[Columns, int]:
        """Return the columns of the condition that is given for n images, as `prefix` takes it, and
        n; with a `placement` it is that of images larger than the transformer has learned.

        Raises:
            UserError: as `prefix` does.
        """
        asked = self.condition(placement)
        columns = {} if condition is None else asked.given(condition)
        count = n if n is not None or not columns else asked.images(columns)
        if count is None or count < 1:
            raise UserError(f"n: {count} is no number of images, give at least 1")
        return columns, count

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the transformer has learned."""
        return self.vqgan.config.image_shape(self.transformer.config.code_shape)

    def condition(self, placement: Placement | None = None) -> Condition:
        """The condition of the images that the transformer has learned, or, with a `placement`, of
        larger ones."""
        own = self.transformer.condition
        return own if placement is None else own.enlarged(placement.sides, placement.image)

    def placement(self, size: tuple[int, int] | None, window_step: int = 1) -> Placement | None:
        """Return how a window goes through images of `size` (h, w) pixels, or None if they are as
        large as what the transformer has learned (`size` None: they are).

        Raises:
            UserError: a size or step that it cannot serve.
        """
        factor, learned = self.vqgan.config.factor, self.size
        if size is None or tuple(size) == learned:
            if window_step != 1:
                raise UserError(
                    f"window_step: {window_step} is for a size above the {learned[0]}x{learned[1]} "
                    f"that the transformer has learned, leave it out"
                )
            return None
        check_sides(size, factor)
        if size[0] < learned[0] or size[1] < learned[1]:
            raise UserError(
                f"size: {size[0]}x{size[1]} is smaller than the {learned[0]}x{learned[1]} that the "
                f"transformer has learned and sees at once, give at least that on both sides"
            )
        check_windows(self.transformer)
        image = size[0] // factor, size[1] // factor
        placement = Placement(self.transformer.config.code_grid, image, window_step)
        self.condition(placement)
        return placement

    def windows(
        self,
        columns: Columns,
        known: Known,
        placement: Placement,
        sampling: Sampling,
        seed: int = 0,
        batch: int = 16,
        memory: float = 2.0,
        first: int = 0,
    ) -> Iterator[Known]:
        """Yield what is known of large images, more and more, from `known` on until all is; they
        are the seed's images from number `first` on. See `window.write_codes`.

        Raises:
            UserError: a condition or setting that these models cannot serve; before the first code.
        """
        self._check(sampling, batch)
        if not memory >= 0:  # nor is a number that is none
            raise UserError(f"window_memory: {memory} GiB, give at least 0")
        known.check(placement.image, self.transformer.config.vocabulary)
        count, (height, width) = len(known), placement.image
        self.condition(placement).prefix(count, columns)
        images = range(first, first + count)
        drawn = uniforms(seed, images, height * width, self.transformer.device)
        steps = write_codes(self.sampled, columns, known, drawn, sampling, placement, batch, memory)
        return evaluated(steps, self.sampled)

    def pictures(self, codes: Tensor, tile: int | None = None) -> Tensor:
        """Return the images [b, 3, h, w] in [-1, 1] (maps in colours) of codes [b, *shape]; `tile`
        as in `tiles.tile_rows`."""
        with evaluating(self.vqgan):
            return decode_pictures(self.vqgan, codes, tile)

    def tiles(self, codes: Tensor, tile: int | None, scratch: Path) -> Iterator[Tensor]:
        """Yield the image of codes [*shape] in tiles [3, n, w], see `tiles.picture_tiles`."""
        return evaluated(picture_tiles(self.vqgan, codes, tile, scratch), self.vqgan)

    def _check(self, sampling: Sampling, batch: int) -> None:
        if sampling.guidance != 1 and not self.transformer.config.null_prefix:
            raise UserError(
                f"guidance: {sampling.guidance} needs a transformer trained with dropped "
                "conditions (loss.condition_dropout), which this one was not; leave guidance=1"
            )
        self.transformer.scheme.sampled_with(sampling.of_scheme)
        if batch < 1:
            raise UserError(f"batch: {batch} images at a time, give at least 1")

    def sampler(self, sampling: Sampling) -> Sampler:
        """Return what writes codes under settings. That of the last ones is kept: its steps are
        recorded on a GPU, and where they are compiled."""
        if self._sampler is None or self._sampler.sampling != sampling:
            recorded = self.compile or self.transformer.device.type == "cuda"
            captured = Captured(self.compile) if recorded else None
            self._sampler = Sampler(self.sampled, sampling, captured)
        return self._sampler

    @torch.no_grad()
    def _images(
        self,
        prefix: Prefix,
        first: int,
        sampling: Sampling,
        seed: int,
        known: Known | None,
        rejection: Rejection,
        watch: Watch | None,
    ) -> Part:
        images = range(first, first + len(prefix))
        with evaluating(self.transformer, self.vqgan):
            candidates = (
                self.sampler(sampling).codes(prefix, seed, numbers, known, watch)
                for numbers in rejection.numbers(images)
            )
            if rejection.candidates == 1:
                codes, scores = next(candidates), None
            else:
                score = rejection.score(self.transformer, self.pictures, prefix)
                codes, scores = best_of(candidates, score)
            return Part(self.pictures(codes), codes, scores)


def generate_codes(
    transformer: Transformer,
    prefix: Prefix,
    sampling: Sampling,
    seed: int,
    images: Sequence[int],
    known: Known | None = None,
) -> Tensor:
    """Return codes [b, *shape] int64 for the prefixes of a seed's images, by their numbers, with
    what is known of them as it is, by the transformer's scheme in its order."""
    return Sampler(transformer, sampling).codes(prefix, seed, images, known)


def check_pair(transformer: Transformer, vqgan: VQGAN) -> None:
    """Raise a UserError if the transformer did not learn the codes of this VQGAN.

    A transformer that names no tokenizer (an empty fingerprint) is held to the vocabulary and the
    shape of the codes only.
    """
    config = transformer.config
    if config.vocabulary != vqgan.config.vocabulary:
        raise UserError(
            f"vqgan: its codebook has {vqgan.config.vocabulary} codes, but the transformer was "
            f"trained on {config.vocabulary}; give the VQGAN that made its codes"
        )
    learned = config.code_shape
    given = vqgan.config.code_shape(*vqgan.config.image_shape(learned))
    if given != learned:
        raise UserError(
            f"vqgan: its codes of an image have the shape {list(given)}, but the transformer was "
            f"trained on {list(learned)}; give the VQGAN that made its codes"
        )
    check_scales(config, vqgan)
    if config.vqgan_fingerprint and not vqgan.wrote(config.vqgan_fingerprint):
        raise UserError(
            f"vqgan: its fingerprint is {vqgan.tokenizer_fingerprint}, but the transformer was "
            f"trained on codes of {config.vqgan_fingerprint}; give the VQGAN that made its codes"
        )


def check_scales(config: TransformerConfig, vqgan: VQGAN) -> None:
    """Raise a UserError if a transformer that writes scale by scale has others than the VQGAN: of
    as many codes, [1,3,4,8] and [1,5,8] for example, so that their shape does not tell."""
    scheme, quantizer = config.scheme, vqgan.config.quantizer
    if not isinstance(scheme, NextScale) or not isinstance(quantizer, MultiScaleConfig):
        return
    ours, theirs = list(scheme.scales), list(quantizer.scales)
    if ours != theirs:
        raise UserError(
            f"model.scheme.scales={ours}: the VQGAN has the scales {theirs}, which a "
            f"transformer on its codes needs too"
        )


def evaluated(steps: Iterator[Step], *modules: nn.Module) -> Iterator[Step]:
    """Pass steps on, whose modules are in eval mode for the while."""
    with evaluating(*modules):
        yield from steps


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode for the while, then back: a preview must not end the training."""
    were_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, were_training, strict=True):
            module.train(was_training)
