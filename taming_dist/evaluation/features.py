"""Features of a set of images, of which every rank has a part."""

import numpy as np
import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.inception import Inception


class Features:
    """The features of a set of images: this rank's, and on request those of all."""

    def __init__(self, network: Inception) -> None:
        self._network = network
        self._ids: list[Tensor] = []
        self._found: list[Tensor] = []

    def add(self, pixels: Tensor, ids: Tensor) -> None:
        """Take in images uint8 [b, 3, h, w] with their numbers int64 [b] in the set."""
        self._ids.append(ids.cpu())
        self._found.append(self._network(pixels).cpu())

    def gathered(self, world: World) -> Tensor:
        """Those of all ranks, fp32 [n, d] on the CPU, in the order of the images (collective)."""
        ids = torch.cat(self._ids) if self._ids else torch.zeros(0, dtype=torch.int64)
        found = torch.cat(self._found) if self._found else torch.zeros(0, self._network.dim)
        parts = world.gather((ids.numpy(), found.numpy()))
        order = np.argsort(np.concatenate([part for part, _ in parts]), kind="stable")
        return torch.from_numpy(np.concatenate([part for _, part in parts])[order])
