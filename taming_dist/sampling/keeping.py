"""What of given pictures is kept: `image=photo.png keep=upper`, `mask=mask.png`, `keep_codes=64`.

Source: arXiv 2012.09841, section 4.2 (image completion).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taming_dist.data.images import Shape
from taming_dist.errors import UserError
from taming_dist.formats.names import printable
from taming_dist.generation.completion import (
    Known,
    first_codes,
    half,
    masked_picture,
    unseen,
    whole_codes,
)
from taming_dist.generation.generator import Generator
from taming_dist.models.prior.orders import arrange
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.given import Given, are_pictures, cut, paths_of, photograph, read_file

BRIGHT = 128  # of a mask: from here on it says that a pixel is to be sampled anew


@dataclass(frozen=True)
class Kept:
    """Pictures of which a part is kept, in turn: the codes at the places `region` [i, j] of all of
    them, or what their `masks` say, one for all or one for each."""

    given: Given
    region: Tensor | None
    masks: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return max(len(self.given), len(self.masks))

    @property
    def key(self) -> str:
        """The key that gives the pictures."""
        return self.given.key

    def name(self, number: int) -> str:
        """The file of a picture."""
        return self.given.name(number)

    def known(self, images: range) -> Known:
        """What is known of some of the images.

        Raises:
            UserError: a picture or mask that cannot be used.
        """
        numbers = [image % len(self) for image in images]
        masks = {number: self.mask(number) for number in set(numbers)}
        codes = self.given.codes(numbers)
        where = torch.stack([masks[k] for k in numbers])
        if codes.ndim == 4:
            where = where.unsqueeze(1).expand(codes.shape)
        return Known(codes, where)

    def picture(self, number: int) -> Tensor:
        """What is kept of a picture, [3, h, w] in [-1, 1] on the CPU."""
        return masked_picture(self.given.picture(number), self.mask(number))

    def mask(self, number: int) -> Tensor:
        """Where codes [i, j] of a picture are kept; `UserError` if it is everywhere, or nowhere."""
        if self.region is not None:
            return self.region
        path = self.masks[number % len(self.masks)]
        mask = self._read(path, self.given.paths[number % len(self.given)])
        name = printable(str(path))
        if mask.all():
            raise UserError(
                f"mask: {name} keeps every code, so nothing is left to sample: paint white what is "
                f"to be sampled anew"
            )
        if not mask.any():
            raise UserError(
                f"mask: {name} keeps no code: black is kept, white is sampled anew, and a code is "
                f"kept if all of its {self.given.vqgan.config.factor} x "
                f"{self.given.vqgan.config.factor} pixels are"
            )
        return mask

    def _read(self, path: Path, image: Path) -> Tensor:
        anew = read_file("mask", path, photograph).mean(2) >= BRIGHT
        factor, (height, width) = self.given.vqgan.config.factor, self.given.shape
        if anew.shape == (height // factor, width // factor):
            return torch.from_numpy(~anew)
        size = self._size(image)
        if anew.shape != size:
            raise UserError(
                f"mask: {printable(str(path))} has {anew.shape[0]} x {anew.shape[1]} pixels, but "
                f"{printable(str(image))} has {size[0]} x {size[1]}: paint it over the image, or "
                f"give one of {height // factor} x {width // factor}, a pixel for each code"
            )
        # the mean over the pixels that each one is made of: above 0 if any of them is new
        touched = cut(anew.astype(np.float32), self.given.shape, Image.Resampling.BOX) > 0
        return whole_codes(torch.from_numpy(~touched), factor)

    def _size(self, image: Path) -> Shape:
        height, width = read_file(self.given.key, image, self.given.reader).shape[:2]
        return height, width


def kept_pictures(config: SampleConfig, generator: Generator, shape: Shape) -> Kept | None:
    """What the command keeps of pictures for images of a shape in pixels; None if it is given none.

    Raises:
        UserError: the keys contradict each other, or leave nothing to do.
    """
    ways = {"keep": config.keep, "mask": config.mask, "keep_codes": config.keep_codes}
    asked = [name for name, value in ways.items() if value is not None]
    if config.image is None:
        if asked:
            raise UserError(f"{asked[0]}: of what? give image=PICTURE, or leave {asked[0]} out")
        return None
    if len(asked) != 1:
        fault = f"not both {asked[0]} and {asked[1]}" if asked else "which part of it is kept?"
        raise UserError(f"image: {fault}: give one of keep=upper, mask=PICTURE and keep_codes=N")
    if len(generator.transformer.config.grid) == 1:
        raise UserError(
            f"image: this transformer has learned sequences of "
            f"{generator.transformer.config.num_tokens} codes, none of which is of a part of a "
            f"picture: leave image and {asked[0]} out"
        )
    paths = paths_of("image", config.image)
    given = Given("image", paths, generator.vqgan, shape, shape)
    if config.mask is not None:
        return Kept(given, None, _masks(config, given))
    factor = generator.vqgan.config.factor
    grid = shape[0] // factor, shape[1] // factor
    if config.keep_codes is not None:
        total, places = grid[0] * grid[1], places_of(generator, grid)
        if config.keep_codes >= total:
            raise UserError(
                f"keep_codes: {config.keep_codes} of {total} codes leave nothing to sample, give "
                f"at most {total - 1}"
            )
        return Kept(given, first_codes(config.keep_codes, grid, places))
    region = half(config.keep, grid)
    if not region.any() or region.all():
        raise UserError(f"keep: {config.keep} is none or all of {grid[0]} x {grid[1]} codes")
    return Kept(given, region)


def _masks(config: SampleConfig, given: Given) -> tuple[Path, ...]:
    """One mask for all pictures; or a mask for each, from a folder by its name."""
    if not are_pictures(config.mask):
        raise UserError(f"mask={config.mask}: name a picture or a folder of pictures")
    masks = paths_of("mask", config.mask)
    if isinstance(config.mask, str) and not Path(config.mask).is_dir():
        return masks
    named = {path.stem: path for path in masks}
    missing = [path.name for path in given.paths if path.stem not in named]
    if missing:
        raise UserError(f"mask: {config.mask} has no mask for {printable(missing[0])}")
    return tuple(named[path.stem] for path in given.paths)


def places_of(generator: Generator, grid: tuple[int, int]) -> Tensor:
    """Where the k-th code of an image of a grid is written, on the CPU: in the order that the
    transformer has learned, and in larger images row by row."""
    transformer = generator.transformer
    learned = grid == transformer.config.code_grid
    return transformer.places.cpu() if learned else torch.arange(grid[0] * grid[1])


def unseen_note(kept: Kept, generator: Generator) -> str:
    """A line for the user if known codes come too late to be seen; else nothing."""
    transformer, mask = generator.transformer, kept.mask(0)
    if not transformer.scheme.causal:
        return ""
    places = places_of(generator, (mask.shape[0], mask.shape[1]))
    sequence = arrange(mask[None].long(), places)[0].bool()
    late, known = unseen(sequence), int(sequence.sum())
    if not late:
        return ""
    return (
        f"note: {late} of the {known} codes that are kept come after sampled ones in the order "
        f"{transformer.order.name}, and a transformer of model/scheme={transformer.scheme.name} "
        f"samples without having seen what comes later"
    )
