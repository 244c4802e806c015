"""Images larger than what the transformer has learned, through a window that slides over them.

Each code is chosen from those in its window (`placement`) that come before it, with the window's
part of the condition. Source: arXiv 2012.09841, section 4.3.

Two things make it fast, and change no code: all codes that do not read each other are chosen
together, of all images; and a window that stands still for several codes keeps what it has read.
Legend: b images, i j code grid of the image, m a group of codes that are chosen together.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.generation.completion import Known
from taming_dist.generation.kept import Kept, numbers
from taming_dist.generation.placement import Placement
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import Columns
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer

GIB = 2**30


class Place(NamedTuple):
    """A code that is to be chosen: of which image, where in it, and where its window begins; all
    places are counted row by row."""

    image: int
    code: int
    corner: int

    @property
    def window(self) -> tuple[int, int]:
        """What names its window."""
        return self.image, self.corner


class Group(NamedTuple):
    """Codes that are chosen together: each reads `tokens` codes of its window, after the first
    `starts` of it that are `kept`."""

    places: list[Place]
    starts: list[int]
    tokens: int
    kept: bool


def check_windows(transformer: Transformer) -> None:
    """Raise a UserError if images are not written row by row, one code after the other."""
    config = transformer.config
    if not transformer.scheme.causal:
        raise UserError(
            f"size: a transformer of model/scheme={config.scheme.name} writes an image of the size "
            f"that it has learned, all over it at once: leave size out"
        )
    if len(config.grid) != 2:
        raise UserError(
            f"size: larger images are written code by code of one grid, but this transformer has "
            f"learned codes of the shape {list(config.grid)}: leave size out"
        )
    if not torch.equal(transformer.places.cpu(), torch.arange(config.num_tokens)):
        raise UserError(
            f"size: larger images are written row by row, but this transformer has learned "
            f"model/order={config.order.name}: leave size out, or train one of model/order=raster"
        )


@torch.no_grad()
def write_codes(
    transformer: Transformer,
    columns: Columns,
    known: Known,
    uniforms: Tensor,
    sampling: Sampling,
    placement: Placement,
    batch: int = 16,
    memory: float = 2.0,
) -> Iterator[Known]:
    """Yield what is known of b images [b, i, j], more and more, from `known` on until all is.

    A code depends on those that its window shows, on the images' condition `columns`, and on its
    number in `uniforms` [b, i * j], not on what else is chosen with it. `batch`: windows that are
    read at a time; `memory`: GiB for what windows keep. What was yielded is not changed later; its
    codes are on the transformer's device.
    """
    prefixes = Prefixes(transformer, columns, placement, len(known.codes))
    todo = Todo(placement, known.mask.cpu())
    kept = Kept(memory * GIB, sum(count > 1 for count in todo.left.values()))
    network = sampling.network(transformer)
    codes = to_device(known.codes, transformer.device)
    for wave in placement.waves():
        places = todo.places(wave)
        if not places:
            continue
        flat = codes.flatten().clone()
        for group in grouped(places, placement.read, kept, prefixes.length, batch):
            index = numbers(todo.indices(group), flat.device)
            read, chosen = index[:, :-1], index[:, -1]
            windows = [place.window for place in group.places]
            if group.kept:
                logits = network.step(flat[read], kept.extended(windows, group.tokens))
            else:
                wanted = [todo.left[window] > 1 for window in windows]
                once = not any(wanted)
                logits, cache = network.begin(prefixes.of(group.places), flat[read], once)
                kept.keep(windows, wanted, cache)
            flat[chosen] = sampling.choose(logits, uniforms.flatten()[chosen])
            for window in todo.finished(group.places):
                kept.drop(window)
        codes = flat.view_as(codes)
        yield Known(codes, todo.mask.clone())


class Todo:
    """Which codes of b images are not known yet, and which windows are still needed for them.

    `mask` [b, i, j] bool: those that are known; `left`: how many codes are still to be chosen
    through a window.
    """

    def __init__(self, placement: Placement, mask: Tensor) -> None:
        self.mask = mask.clone()
        self._known = self.mask.flatten(1).numpy()  # the same memory
        self._corners = placement.corners
        self._codes = self._corners.size
        number = np.arange(placement.sides[0] * placement.sides[1])
        self._inside = number // placement.sides[1] * placement.image[1]
        self._inside += number % placement.sides[1]
        images, codes = np.nonzero(~self._known)
        corners = self._corners[codes].tolist()
        self.left = Counter(zip(images.tolist(), corners, strict=True))

    def places(self, wave: np.ndarray) -> list[Place]:
        """The codes of a wave that are not known, of all images."""
        unknown = ~self._known[:, wave]
        return [
            Place(image, code, corner)
            for column, (code, corner) in enumerate(
                zip(wave.tolist(), self._corners[wave].tolist(), strict=True)
            )
            for image in np.flatnonzero(unknown[:, column]).tolist()
        ]

    def indices(self, group: Group) -> np.ndarray:
        """Where among the codes of all images is what each code of a group reads, and last where it
        is itself: int64 [m, tokens + 1]."""
        images, codes, corners = (np.array(part) for part in zip(*group.places, strict=True))
        read = np.array(group.starts)[:, None] + np.arange(group.tokens)
        places = np.concatenate([corners[:, None] + self._inside[read], codes[:, None]], axis=1)
        return places + images[:, None] * self._codes

    def finished(self, places: Sequence[Place]) -> list[tuple[int, int]]:
        """Note that codes were chosen; return the windows that are needed for no other."""
        for place in places:
            self._known[place.image, place.code] = True
            self.left[place.window] -= 1
        return [place.window for place in places if self.left[place.window] == 0]


def grouped(
    places: Sequence[Place], read: np.ndarray, kept: Kept, prefix: int, batch: int
) -> Iterator[Group]:
    """Yield places in groups of at most `batch` that read equally many codes.

    `read`: how many codes of its window each code of an image reads (`Placement.read`); of the
    positions that are `kept` of a window, the first `prefix` are the condition's.
    """
    alike: dict[tuple[bool, int], list[tuple[Place, int]]] = defaultdict(list)
    for place in places:
        positions = kept.length(place.window)
        start = positions - prefix if positions else 0
        alike[positions > 0, int(read[place.code]) - start].append((place, start))
    for (is_kept, count), members in alike.items():
        for at in range(0, len(members), batch):
            some, starts = zip(*members[at : at + batch], strict=True)
            yield Group(list(some), list(starts), count, is_kept)


class Prefixes:
    """The prefixes of windows of images, from the columns of the whole images."""

    def __init__(
        self, transformer: Transformer, columns: Columns, placement: Placement, images: int
    ) -> None:
        self._condition, self._device = transformer.condition, transformer.device
        self._columns, self._placement, self._images = columns, placement, images
        self.length = self._condition.length
        self._everywhere: Prefix | None = None
        if self._cut(0) is columns:
            self._everywhere = self._condition.prefix(images, columns).to(self._device)

    def of(self, places: Sequence[Place]) -> Prefix:
        """Return the prefixes of the windows of places, on the device."""
        if self._everywhere is not None:
            chosen = numbers([place.image for place in places], self._device)
            return self._everywhere.map(lambda part: part[chosen])
        seen: dict[int, Prefix] = {}
        for corner in {place.corner for place in places}:
            seen[corner] = self._condition.prefix(self._images, self._cut(corner))
        parts = [
            torch.stack([seen[place.corner].parts[k][place.image] for place in places])
            for k in range(len(self._condition.conditions))
        ]
        return Prefix(tuple(parts)).to(self._device)

    def _cut(self, corner: int) -> Columns:
        window = self._placement.window(corner)
        return self._condition.window(self._images, self._columns, window)
