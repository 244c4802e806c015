"""The training images that look most like given ones: what a model has learned by heart lies close.

LPIPS (arXiv 1801.03924, equation 1) is the squared distance of two images' features, once each is
scaled by the root of its weight. So a pass of the network over each image is enough, and all pairs
are one product of matrices.

Legend: n given images, b others, k nearest ones, d numbers of all features of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taming_dist.copies import fetch, to_device
from taming_dist.engine.world import World
from taming_dist.formats.png import save_png
from taming_dist.generation.pictures import image_grid
from taming_dist.losses.perceptual import LPIPS

PICTURE = "nearest.png"


@dataclass
class Nearest:
    """The `k` nearest of all images shown to it, for each of `images` uint8 [n, 3, h, w].

    `distances` [n, k] ascend; `numbers` int64 [n, k] and `pictures` uint8 [n, k, 3, h, w] are those
    of the images found once `gather` was called, fewer where fewer than k were shown.
    """

    lpips: LPIPS
    images: Tensor
    k: int

    def __post_init__(self) -> None:
        self._given = self._features(self.images)
        self._arriving: tuple[Callable[[], Tensor], Tensor, Tensor] | None = None
        count = len(self.images)
        self.distances = torch.zeros(count, 0)
        self.numbers = torch.zeros(count, 0, dtype=torch.int64)
        self.pictures = torch.zeros(count, 0, *self.images.shape[1:], dtype=torch.uint8)

    @torch.no_grad()
    def update(self, images: Tensor, numbers: Tensor) -> None:
        """Look at images uint8 [b, 3, h, w] with their numbers int64 [b]."""
        features = self._features(images)
        squares = [part.square().sum(1) for part in (self._given, features)]
        distances = squares[0][:, None] + squares[1] - 2 * self._given @ features.T
        self._take_arriving()
        # rounding may leave them below 0
        self._arriving = fetch(distances.clamp(min=0)), numbers.cpu(), images.cpu()

    def gather(self, world: World) -> None:
        """Have the nearest of what all ranks were shown (collective)."""
        self._take_arriving()
        ours = (self.distances.numpy(), self.numbers.numpy(), self.pictures.numpy())
        parts = world.gather(ours)
        others = [part for rank, part in enumerate(parts) if rank != world.rank]
        for part in others:
            self._take(*map(torch.from_numpy, part))

    def figures(self, images: Sequence[int]) -> dict[str, Any]:
        """`nearest_lpips`, the mean over the given images of the distance to the nearest one, and
        `nearest_lpips_least`; `nearest` lists for each of them, by its number, the numbers of those
        found and their distances."""
        rows = zip(images, self.numbers.tolist(), self.distances.tolist(), strict=True)
        return {
            "nearest_lpips": float(self.distances[:, 0].mean()),
            "nearest_lpips_least": float(self.distances[:, 0].min()),
            "nearest": [
                {"image": image, "numbers": numbers, "lpips": [round(each, 6) for each in found]}
                for image, numbers, found in rows
            ],
        }

    def _take_arriving(self) -> None:
        """Take in the batch whose distances are on their way from the device."""
        if self._arriving is not None:
            (arrived, numbers, pictures), self._arriving = self._arriving, None
            each = len(self.images)
            self._take(arrived(), numbers.expand(each, -1), pictures.expand(each, -1, -1, -1, -1))

    def _take(self, distances: Tensor, numbers: Tensor, pictures: Tensor) -> None:
        """Keep the nearest of those known and of others [n, b] and [n, b, 3, h, w]; of equally near
        ones the first."""
        distances = torch.cat([self.distances, distances], 1)
        numbers = torch.cat([self.numbers, numbers], 1)
        by_number = numbers.argsort(1)
        order = by_number.gather(1, distances.gather(1, by_number).argsort(dim=1, stable=True))
        best = order[:, : self.k]
        self.distances, self.numbers = distances.gather(1, best), numbers.gather(1, best)
        pictures = torch.cat([self.pictures, pictures], 1)
        self.pictures = pictures[torch.arange(len(best))[:, None], best]

    def _features(self, images: Tensor) -> Tensor:
        """Features [b, d] of images uint8, between which squared distances are LPIPS."""
        device = self.lpips.shift.device
        layers = self.lpips.features(to_device(images, device).float() / 127.5 - 1)
        scaled = [
            layer * (head.clamp(min=0) / layer[0, 0].numel()).sqrt()
            for layer, head in zip(layers, self.lpips.heads, strict=True)
        ]
        return torch.cat([layer.flatten(1) for layer in scaled], 1)


def save_nearest(nearest: Nearest, out: Path) -> None:
    """Write a row for each given image: itself, and then the nearest ones."""
    rows = torch.cat([nearest.images.cpu()[:, None], nearest.pictures], 1)
    save_png(image_grid(rows.flatten(0, 1), rows.shape[1]), out / PICTURE)
