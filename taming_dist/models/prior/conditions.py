"""What stands before the image's tokens: the condition c of p(s | c), as a short prefix of tokens.

Source: arXiv 2012.09841, section 3.2, equation 9 ("prepend c to s"). The prefix is numbers from 0
to `vocabulary` - 1; whether they have a table of embeddings of their own is the transformer's
business (`condition_table`).
"""

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from taming_dist.errors import UserError

START_TOKEN = 0


class Condition(Protocol):
    """How a batch's condition becomes the prefix that the transformer reads first.

    `length` is the number of prefix tokens m (at least 1: the first image token is predicted from
    the prefix), `vocabulary` how many different tokens there are, `column` what of a batch of codes
    is given to `tokens`.
    """

    length: int
    vocabulary: int
    column: str

    def tokens(
        self, count: int, given: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Return the prefix [b, m] int64 of `count` images, on `device`, from what was given."""
        ...


class ClassCondition:
    """One token, the class of the image."""

    length = 1
    column = "classes"

    def __init__(self, classes: int) -> None:
        if classes < 1:
            raise UserError(
                f"model.classes: {classes} is too few for condition=class, give at least 1"
            )
        self.vocabulary = classes

    def tokens(
        self, count: int, given: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Return classes [b] as prefix [b, 1] int64.

        The range is checked by value: hand the classes over while they are on the CPU.

        Raises:
            UserError: there are no classes, not `count` of them, or one is outside the model's.
        """
        if given is None:
            raise UserError("class_id: this transformer is class-conditional, give classes for it")
        if given.shape != (count,):
            raise UserError(f"class_id: {count} images need {count} classes, not {len(given)}")
        outside = given[(given < 0) | (given >= self.vocabulary)]
        if outside.numel():
            raise UserError(
                f"class_id: {int(outside[0])} is outside the model's classes, "
                f"give 0 to {self.vocabulary - 1}"
            )
        return given.long().unsqueeze(1).to(device)


class CodesCondition:
    """The codes that a second VQGAN gives a label map, a depth map or the like, in raster order.

    Source: arXiv 2012.09841, section 3.2, "conditioned synthesis"; `grid` and `vocabulary` are
    those of the second VQGAN's codes.
    """

    column = "conditions"

    def __init__(self, grid: Sequence[int], vocabulary: int) -> None:
        if len(grid) != 2 or min(grid) < 1 or vocabulary < 1:
            raise UserError(
                f"model.condition_grid: {list(grid)} with model.condition_vocabulary={vocabulary} "
                f"are no codes; leave them out, they are those of the code shards"
            )
        self.grid, self.vocabulary = tuple(grid), vocabulary
        self.length = prod(grid)

    def tokens(
        self, count: int, given: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Return codes [b, k, l] as prefix [b, k * l] int64.

        The range is checked by value: hand the codes over while they are on the CPU.

        Raises:
            UserError: there are no codes, they are of another grid, or one is outside the
                vocabulary.
        """
        if given is None:
            raise UserError(
                "condition: this transformer is conditioned on the codes of a second VQGAN, give "
                "code shards that have them (tools/tokenize_dataset.py --condition-model)"
            )
        if given.shape != (count, *self.grid):
            raise UserError(
                f"condition: {count} images need codes of the grid {list(self.grid)}, not "
                f"{list(given.shape)}"
            )
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < self.vocabulary:
            raise UserError(f"condition: a code is outside of 0 to {self.vocabulary - 1}")
        return given.long().flatten(1).to(device)


class Unconditional:
    """One start token, the same for every image; classes that come with the data are ignored."""

    length = 1
    vocabulary = START_TOKEN + 1
    column = "classes"

    def tokens(
        self, count: int, given: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Return `count` start tokens as prefix [b, 1] int64."""
        return torch.full((count, 1), START_TOKEN, dtype=torch.int64, device=device)


def build_condition(
    name: str, classes: int, grid: Sequence[int] = (), vocabulary: int = 0
) -> Condition:
    """Return the condition that a config calls `class`, `codes` or `none`.

    `grid` and `vocabulary` are those of the condition's codes.

    Raises:
        UserError: another name, or numbers that do not fit it.
    """
    if name == "class":
        return ClassCondition(classes)
    if name == "codes":
        return CodesCondition(grid, vocabulary)
    if name == "none":
        return Unconditional()
    raise UserError(f"model.condition: {name!r} is unknown, choose class, codes or none")
