"""Features of a set of images, of which every rank has a part."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from taming_dist.copies import fetch
from taming_dist.engine.world import World
from taming_dist.inception import Inception

NONE = -1  # the class of an image without one
ON_DEVICE = 100 * 2**20  # bytes of features there: those of 6,400 images, of 4,071 numbers each


class Features:
    """The features of a set of images: this rank's, and on request those of all.

    They stay on the device until there are `ON_DEVICE` bytes of them, which are then fetched while
    it goes on with the next images. `find` gives those of images, uint8 [b, 3, h, w] -> fp32
    [b, d], on the CPU 4 bytes for each of the `dim` numbers.
    """

    def __init__(self, find: Callable[[Tensor], Tensor], dim: int) -> None:
        self._find, self.dim = find, dim
        self._ids: list[Tensor] = []
        self._classes: list[Tensor] = []
        self._found: list[Tensor] = []
        self._bytes = 0
        self._fetched: list[Callable[[], Tensor]] = []

    @classmethod
    def with_spatial(cls, network: Inception) -> "Features":
        """The features of a network and its spatial ones, as `Inception.with_spatial` has them: of
        an image 16 KiB, 2,048 numbers and 2,023."""
        return cls(network.with_spatial, network.dim + network.spatial_dim)

    def add(self, pixels: Tensor, ids: Tensor, classes: Tensor | None = None) -> None:
        """Take in images uint8 [b, 3, h, w] with their numbers int64 [b] in the set, and their
        classes int64 [b], if they have any."""
        self._ids.append(ids.cpu())
        self._classes.append(torch.full_like(ids, NONE).cpu() if classes is None else classes.cpu())
        self._found.append(self._find(pixels))
        self._bytes += self._found[-1].nbytes
        if self._bytes >= ON_DEVICE:
            self._fetch()

    def gathered(self, world: World) -> Tensor:
        """Those of all ranks, fp32 [n, d], on the CPU and in the order of the images
        (collective)."""
        self._fetch()
        return gathered(self._ids, (arrived() for arrived in self._fetched), self.dim, world)

    def classes(self, world: World) -> Tensor | None:
        """The class of each image of all ranks, int64 [n], in the order of the images; None unless
        all have one (collective)."""
        nothing = torch.zeros(0, dtype=torch.int64)
        found = in_order(self._ids, torch.cat([nothing, *self._classes]), world)
        return None if (found == NONE).any() else found

    def _fetch(self) -> None:
        """Begin to copy those on the device to the CPU."""
        if self._found:
            self._fetched.append(fetch(torch.cat(self._found)))
            self._found, self._bytes = [], 0


def gathered(ids: Iterable[Tensor], found: Iterable[Tensor], dim: int, world: World) -> Tensor:
    """The features of all ranks, fp32 [n, dim], on the CPU and in the order of their images: of
    each rank the numbers of some in `ids`, and their features in `found` (collective)."""
    return in_order(ids, torch.cat([torch.zeros(0, dim), *found]), world)


def in_order(ids: Iterable[Tensor], rows: Tensor, world: World) -> Tensor:
    """The rows [b, ...] of the images `ids` of all ranks, in the order of the images
    (collective)."""
    numbers = torch.cat([torch.zeros(0, dtype=torch.int64), *ids])
    parts = world.gather((numbers.numpy(), rows.numpy()))
    order = np.argsort(np.concatenate([part for part, _ in parts]), kind="stable")
    return torch.from_numpy(np.concatenate([part for _, part in parts])[order])
