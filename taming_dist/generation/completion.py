"""Images of which a part is known: completion from any region, and variation.

The known codes stay as they are; the others are generated around them, in the order's sequence.
Source: arXiv 2012.09841, section 4.2 (image completion; figure "completions").

Legend: b images, i j code grid, n = i * j tokens, h w pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.models.prior.orders import Order, arrange, grid_of, restore
from taming_dist.models.prior.schemes import KnownTokens

HALVES = ("upper", "lower", "left", "right")
UNKNOWN = -0.5  # the shade, in [-1, 1], of what is not known in a picture


@dataclass(frozen=True)
class Known:
    """What of b images is known: `codes` [b, *shape] int64 where `mask` [b, *shape] bool is true;
    elsewhere the codes mean nothing. A mask [*shape] is that of every image, and where there are
    several codes at a place, [i, j] that of all of them.

    Raises:
        UserError: the mask has another grid than the codes.
    """

    codes: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shape = self.codes.shape
        known = (shape, shape[1:], shape[2:]) if self.codes.ndim == 4 else (shape, shape[1:])
        if self.mask.shape not in known:
            raise UserError(
                f"known: a mask {list(self.mask.shape)} does not fit codes "
                f"{list(self.codes.shape)}: give one of their grid"
            )
        object.__setattr__(self, "mask", self.mask.bool().expand(self.codes.shape))

    @classmethod
    def nothing(cls, count: int, shape: Sequence[int]) -> "Known":
        """Return it of `count` images of which nothing is known."""
        codes = torch.zeros(count, *shape, dtype=torch.int64)
        return cls(codes, torch.zeros(*shape, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image's codes."""
        return tuple(self.codes.shape[1:])

    def rows(self, chosen: slice | Tensor) -> "Known":
        """Return what is known of some of the images."""
        return Known(self.codes[chosen], self.mask[chosen])

    def in_turn(self, count: int) -> "Known":
        """Return what is known of `count` images, which are these in turn."""
        return self.rows(torch.arange(count) % len(self))

    def check(self, shape: tuple[int, ...], vocabulary: int) -> None:
        """Raise a UserError unless there are codes of this shape, below the vocabulary where they
        are known; those that lie on a device came from a VQGAN, and are not waited for."""
        if not len(self):
            raise UserError("known: it is of no image, give the codes of at least one")
        if self.shape != shape:
            raise UserError(
                f"known: codes of the grid {list(self.shape)}, but images have {list(shape)}"
            )
        if self.codes.device.type == "cpu":
            kept = self.codes[self.mask.cpu()]
            if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < vocabulary:
                raise UserError(f"known: a code is outside of 0 to {vocabulary - 1}")

    def tokens(self, order: Order, device: torch.device) -> KnownTokens:
        """Return it in an order, on the device. A mask that lies on the CPU is not waited for."""
        places = order.places(grid_of(self.shape))
        mask = arrange(self.mask, to_device(places, self.mask.device))
        leading = int(mask.all(0).long().cumprod(0).sum())
        tokens = arrange(to_device(self.codes, device), to_device(places, device))
        return KnownTokens(tokens, to_device(mask, device), leading)


# Is told after each step of writing images how to see what is known of them by then.
Watch = Callable[[Callable[[], Known]], None]


def half(keep: str | float, grid: tuple[int, int]) -> Tensor:
    """Return the mask [i, j] of a half of HALVES, or of a share of the rows, counted from the top.

    A middle row or column belongs to no half.

    Raises:
        UserError: it is neither.
    """
    rows, columns = grid
    mask = torch.zeros(grid, dtype=torch.bool)
    if keep == "upper":
        mask[: rows // 2] = True
    elif keep == "lower":
        mask[rows - rows // 2 :] = True
    elif keep == "left":
        mask[:, : columns // 2] = True
    elif keep == "right":
        mask[:, columns - columns // 2 :] = True
    elif isinstance(keep, int | float) and 0 < keep < 1:
        mask[: round(keep * rows)] = True
    else:
        raise UserError(
            f"keep={keep}: use {', '.join(HALVES)}, or a share of the rows from the top such as "
            f"0.25"
        )
    return mask


def first_codes(count: int, shape: Sequence[int], places: Tensor) -> Tensor:
    """Return the mask [*shape] of the first codes of an order that has its k-th place at
    places[k]."""
    sequence = torch.arange(math.prod(shape), device=places.device)
    return restore(sequence[None], shape, places)[0] < count


def whole_codes(kept: Tensor, factor: int) -> Tensor:
    """Return the mask [i, j] of codes all of whose factor x factor pixels in [h, w] are kept."""
    i, j = (side // factor for side in kept.shape)
    return kept.reshape(i, factor, j, factor).permute(0, 2, 1, 3).flatten(2).all(-1)


def unseen(mask: Tensor) -> int:
    """Return how many known tokens of an image, mask [n] in its order, follow the first one that is
    not: a causal transformer generates that one without having seen them."""
    unknown = (~mask).nonzero()
    return int(mask[int(unknown[0]) :].sum()) if len(unknown) else 0


def grids_known(mask: Tensor) -> Tensor:
    """Return where in the grid [i, j] all codes are known of a mask [*shape]."""
    if mask.ndim == 1:
        return mask.all()[None, None]
    return mask.all(0) if mask.ndim == 3 else mask


def masked_picture(picture: Tensor, mask: Tensor) -> Tensor:
    """Return a picture [3, h, w] in [-1, 1] with a flat shade where not all codes of a place, mask
    [i, j] or [levels, i, j], are known; of a sequence, mask [n], each code may be of all places."""
    mask = grids_known(mask)
    shown = F.interpolate(mask[None, None].float(), picture.shape[-2:])[0, 0] > 0
    return torch.where(shown, picture, UNKNOWN)
