"""Images shown beside their reconstructions."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.formats.png import save_png
from taming_dist.generation.pictures import image_grid

COLUMNS = 8


class Pictures:
    """A few images, spread evenly over the data set, with their reconstructions."""

    def __init__(self, count: int, num_samples: int) -> None:
        spread = np.linspace(0, num_samples - 1, min(max(count, 0), num_samples))
        self.ids = torch.from_numpy(spread.round().astype(np.int64))
        self.pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, images: Tensor, reconstructions: Tensor, ids: Tensor) -> None:
        """Keep the chosen images of a batch uint8 [b, 3, h, w] with ids [b]."""
        for row in torch.isin(ids, self.ids).nonzero().flatten().tolist():
            pair = images[row].cpu().numpy(), reconstructions[row].cpu().numpy()
            self.pairs[int(ids[row])] = pair

    def gather(self, world: World) -> None:
        """Have those of all ranks (collective)."""
        self.pairs = {
            number: pair for part in world.gather(self.pairs) for number, pair in part.items()
        }

    def save(self, out: Path) -> None:
        """Write each pair, and a grid with reconstructions below their inputs."""
        pairs = [tuple(map(torch.from_numpy, self.pairs[number])) for number in sorted(self.pairs)]
        for number, pair in enumerate(pairs):
            for picture, name in zip(pair, ("input", "reconstruction"), strict=True):
                save_png(picture, out / "images" / f"{number:03d}-{name}.png")
        columns = min(COLUMNS, len(pairs))
        rows: list[Tensor] = []
        while columns and len(pairs) >= columns:  # an incomplete last row is left out
            inputs, outputs = zip(*pairs[:columns], strict=True)
            rows += [*inputs, *outputs]
            del pairs[:columns]
        if rows:
            save_png(image_grid(torch.stack(rows), columns), out / "reconstructions.png")
