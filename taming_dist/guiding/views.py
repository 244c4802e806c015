"""What CLIP is shown of a picture in one step: cut-outs of it, each changed a little at random.

Source: arXiv 2204.08583, section 3.2. Legend: n cut-outs, h w pixels of the picture, s of a
cut-out's side.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from taming_dist.guiding.cutouts import cut_out, draw_boxes, margin_of, turned

# The largest changes, at a strength of 1.
TURN = math.radians(10)
STRETCH = 0.2  # of height against width, as a logarithm
COLOUR = 0.2  # of brightness, contrast and saturation, as shares
NOISE = 0.1  # standard deviation, of a range of 1
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Views:
    """`count` cut-outs of `size` pixels, `smallest` and `power` as in `draw_boxes`. `strength`,
    from 0 to 1, is that of the changes; at 0 there are none, mirrored ones included."""

    size: int
    count: int
    smallest: float = 0.3
    power: float = 1.0
    strength: float = 1.0

    def __call__(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """A picture [1, 3, h, w] with colours in [0, 1] -> cut-outs [n, 3, s, s]; the generator is
        on its device."""
        shape = (picture.shape[2], picture.shape[3])
        stretch, turn = self.strength * STRETCH, self.strength * TURN
        boxes = draw_boxes(
            shape,
            self.count,
            generator,
            self.smallest,
            self.power,
            stretch,
            flips=self.strength > 0,
        )
        if not self.strength:
            return cut_out(picture, boxes, self.size)
        margin = margin_of(turn, self.size)
        cutouts = cut_out(picture, boxes, self.size, margin)
        cutouts = turned(cutouts, turn * self._signed(generator))
        cutouts = cutouts[..., margin : margin + self.size, margin : margin + self.size]
        colours = [1 + self.strength * COLOUR * self._signed(generator) for _ in range(3)]
        cutouts = recoloured(cutouts, *colours)
        amount = self.strength * NOISE * self._uniform(generator)[:, None, None, None]
        noise = torch.randn(cutouts.shape, generator=generator, device=generator.device)
        return cutouts + amount * noise

    def _uniform(self, generator: torch.Generator) -> Tensor:
        return torch.rand(self.count, generator=generator, device=generator.device)

    def _signed(self, generator: torch.Generator) -> Tensor:
        return 2 * self._uniform(generator) - 1


def recoloured(cutouts: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Cut-outs [n, 3, s, s] whose colours are multiplied by a factor [n], then their distances from
    the mean, then from grey; 1 leaves them as they are."""
    brightness, contrast, saturation = (
        factor[:, None, None, None] for factor in (brightness, contrast, saturation)
    )
    cutouts = cutouts * brightness
    cutouts = torch.lerp(cutouts.mean((1, 2, 3), keepdim=True), cutouts, contrast)
    grey = sum(weight * cutouts[:, [c]] for c, weight in enumerate(LUMA))
    return torch.lerp(torch.as_tensor(grey), cutouts, saturation)
