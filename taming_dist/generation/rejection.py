"""Rejection sampling: of several candidates for an image, the one with the best score stays.

Source: arXiv 1906.00446, section 3.3 (a classifier's probability of the class); arXiv 2012.09841,
section 4.4, states results by the acceptance rate. Where there is no classifier, the transformer's
own likelihood takes its place.

Legend: b images, i j code grid, n = i * j tokens, h w pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.orders import arrange
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import LIKELIHOOD
from taming_dist.models.prior.transformer import Transformer
from taming_dist.ranges import check_ranges, ranged

# images [b, 3, h, w] in [-1, 1] and their classes [b] int64 -> scores [b]; the larger, the better
Classifier = Callable[[Tensor, Tensor], Tensor]
LEAST_ACCEPTANCE = 1e-6  # a million candidates for each image
NO_CLASS = (
    "classifier: this transformer is not class-conditional, so images have no class to be "
    "recognised as; leave it out to choose them by their likelihood"
)


@dataclass(frozen=True)
class Rejection:
    """How many candidates there are for an image, 1 / `acceptance` rounded, and what scores them.

    Image k of a seed is the best of the images k * m to k * m + m - 1 that the seed gives without
    rejection, where m is their number, all with the condition of image k; of equal ones the first.
    So it depends on the seed and k only. `classifier` None: the log-likelihood of the codes.

    Raises:
        UserError: a rate that is none.
    """

    acceptance: float = ranged(1.0, at_least=LEAST_ACCEPTANCE, at_most=1)
    classifier: Classifier | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def candidates(self) -> int:
        """For each image."""
        return round(1 / self.acceptance)

    def numbers(self, images: range) -> Iterator[range]:
        """Yield the numbers that the first, the second ... candidates of images have in a seed."""
        count = self.candidates
        for candidate in range(count):
            yield range(images.start * count + candidate, images.stop * count, count)

    def check_one(self) -> None:
        """Raise a UserError if there are several candidates, which large images have not."""
        if self.candidates > 1:
            raise UserError(
                f"acceptance: {self.acceptance} has candidates for images of the size that the "
                f"transformer has learned only: leave acceptance or size out"
            )

    def check(self, transformer: Transformer) -> None:
        """Raise a UserError if there is nothing to score the transformer's images by."""
        if self.classifier is None:
            check_has_likelihood(transformer)
        elif _class_part(transformer) is None:
            raise UserError(NO_CLASS)

    def score(
        self, transformer: Transformer, decode: Callable[[Tensor], Tensor], prefix: Prefix
    ) -> Callable[[Tensor], Tensor]:
        """Return what scores candidates [b, i, j] for the images of prefixes, see `check`; `decode`
        gives their images [b, 3, h, w] in [-1, 1]."""
        classifier = self.classifier
        if classifier is None:
            return lambda codes: log_likelihood(transformer, codes, prefix)
        part = _class_part(transformer)
        assert part is not None, "it was checked"
        classes = prefix.parts[part][:, 0]
        return lambda codes: scored(classifier, decode(codes), classes)


def scored(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """Return the scores [b] of images.

    Raises:
        UserError: the classifier gives another number of them, which would mix the images up.
    """
    scores = classifier(images, classes)
    if scores.shape != classes.shape:
        raise UserError(
            f"classifier: it gave scores {list(scores.shape)} for {len(classes)} images: let it "
            f"give one for each, [{len(classes)}]"
        )
    return scores


ALL = Rejection()  # that rejects nothing


def best_of(
    candidates: Iterable[Tensor], score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return, of candidates [b, *shape] for b images, the codes with the best scores, and the
    scores [b].

    A score that is not a number is the worst one. The host never waits for the device.
    """
    left = iter(candidates)
    best = next(left)
    highest = _comparable(score(best))
    for codes in left:
        scores = _comparable(score(codes))
        better = scores > highest
        best = torch.where(better.view(-1, *[1] * (codes.ndim - 1)), codes, best)
        highest = torch.where(better, scores, highest)
    return best, highest


def _comparable(scores: Tensor) -> Tensor:
    return scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def log_likelihood(transformer: Transformer, codes: Tensor, prefix: Prefix) -> Tensor:
    """Return log p(s | c) [b] in nats of codes [b, *shape], at temperature 1 and without guidance.

    Raises:
        UserError: the transformer's scheme has no such number.
    """
    check_has_likelihood(transformer)
    tokens = arrange(codes, transformer.places)
    return -transformer(tokens, prefix, targets=tokens).double().sum(1)


def _class_part(transformer: Transformer) -> int | None:
    """Which part of a prefix has the class; None if none has."""
    conditions = enumerate(transformer.condition.conditions)
    return next((k for k, each in conditions if isinstance(each, ClassCondition)), None)


def check_has_likelihood(transformer: Transformer) -> None:
    """Raise a UserError if the likelihood of images cannot be had from the transformer."""
    scheme = transformer.scheme
    if scheme.measure != LIKELIHOOD:
        raise UserError(
            f"acceptance: a transformer of model/scheme={scheme.name} has no likelihood to choose "
            f"images by: give a classifier"
        )
