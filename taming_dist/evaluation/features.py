"""Features of a set of images, of which every rank has a part."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from taming_dist.copies import fetch
from taming_dist.engine.world import World
from taming_dist.inception import Inception

ON_DEVICE = 100 * 2**20  # bytes of features there: those of 6,400 images, of 4,071 numbers each


class Features:
    """The features of a set of images: this rank's, and on request those of all.

    They stay on the device until there are `ON_DEVICE` bytes of them, which are then fetched while
    it goes on with the next images. On the CPU an image takes 16 KiB: 2,048 numbers,
    and 2,023 of the spatial features.
    """

    def __init__(self, network: Inception) -> None:
        self._network = network
        self._ids: list[Tensor] = []
        self._found: list[Tensor] = []
        self._bytes = 0
        self._fetched: list[Callable[[], Tensor]] = []

    def add(self, pixels: Tensor, ids: Tensor) -> None:
        """Take in images uint8 [b, 3, h, w] with their numbers int64 [b] in the set."""
        self._ids.append(ids.cpu())
        self._found.append(self._network.with_spatial(pixels))
        self._bytes += self._found[-1].nbytes
        if self._bytes >= ON_DEVICE:
            self._fetch()

    def gathered(self, world: World) -> Tensor:
        """Those of all ranks, fp32 [n, d + s] as `Inception.with_spatial` has them, on the CPU and
        in the order of the images (collective)."""
        self._fetch()
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *self._ids])
        empty = torch.zeros(0, self._network.dim + self._network.spatial_dim)
        found = torch.cat([empty, *(arrived() for arrived in self._fetched)])
        parts = world.gather((ids.numpy(), found.numpy()))
        order = np.argsort(np.concatenate([part for part, _ in parts]), kind="stable")
        return torch.from_numpy(np.concatenate([part for _, part in parts])[order])

    def _fetch(self) -> None:
        """Begin to copy those on the device to the CPU."""
        if self._found:
            self._fetched.append(fetch(torch.cat(self._found)))
            self._found, self._bytes = [], 0
