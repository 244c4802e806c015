"""The optimisation of one picture. Source: arXiv 2204.08583, section 3."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taming_dist.exact import without_autocast
from taming_dist.generation.pictures import to_uint8
from taming_dist.guiding.model import ImageTextModel
from taming_dist.guiding.objective import Objective
from taming_dist.guiding.variables import Variable
from taming_dist.guiding.views import Views
from taming_dist.models.convolution import laid_out
from taming_dist.models.vqgan import VQGAN

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 has nothing between 0 and 6e-8: gradients are this much larger while they pass CLIP
FP16_SCALE = 1024.0


@dataclass(frozen=True)
class Settings:
    """`steps` of Adam at the rate `lr`; `pull`: weight of the squared distance from the start. The
    temperature of `Codes` sinks from the first to the last step, by the same factor each time.
    `precision`, of DTYPES, is that of CLIP's image encoder."""

    steps: int
    lr: float
    pull: float = 0.0
    temperature: float = 1.0
    final_temperature: float = 0.1
    precision: str = "fp32"

    def temperature_at(self, step: int) -> float:
        """That of a step, counted from 0."""
        share = step / max(1, self.steps - 1)
        return self.temperature ** (1 - share) * self.final_temperature**share


@dataclass(frozen=True)
class Guidance:
    """What tells how good a picture is: a CLIP, what it is shown, and what is asked for."""

    model: ImageTextModel
    views: Views
    objective: Objective

    def loss(self, images: Tensor, generator: torch.Generator, precision: str = "fp32") -> Tensor:
        """The loss [] of images [1, 3, h, w] in about [-1, 1]."""
        colours = (clamped(images.float()) + 1) / 2
        return self.objective(self.embeddings(self.views(colours, generator), precision))

    def embeddings(self, pictures: Tensor, precision: str = "fp32") -> Tensor:
        """The embeddings [n, e] fp32 of pictures [n, 3, s, s] with colours in [0, 1]."""
        dtype, device = DTYPES[precision], pictures.device
        mean, std = (
            pictures.new_tensor(each).view(3, 1, 1) for each in (self.model.mean, self.model.std)
        )
        pictures = laid_out((pictures - mean) / std)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = self.model.encode_image(pictures)
        with without_autocast(device):
            return found.float()


@dataclass(eq=False)
class Optimisation:
    """A picture under way; nothing but `steps` changes it. On a GPU the host waits for nothing here
    but in `picture`."""

    vqgan: VQGAN
    variable: Variable
    guidance: Guidance
    settings: Settings
    generator: torch.Generator

    def steps(self) -> Iterator[Tensor]:
        """Make one step after the other, and yield the loss [] that it began with, on the device:
        of one draw of cut-outs, with the pull."""
        parameter, settings = self.variable.parameter, self.settings
        optimizer = torch.optim.Adam([parameter], lr=settings.lr)
        scale = FP16_SCALE if settings.precision == "fp16" else 1.0
        for step in range(settings.steps):
            entries = self.variable.draw(settings.temperature_at(step), self.generator)
            images = self.decode(entries)
            loss = self.guidance.loss(images, self.generator, settings.precision)
            if settings.pull:
                loss = loss + settings.pull * self.variable.pull()
            (gradient,) = torch.autograd.grad(loss * scale, parameter)
            parameter.grad = gradient / scale
            optimizer.step()
            self.variable.bound()
            yield loss.detach()

    def decode(self, entries: Tensor) -> Tensor:
        """Entries [1, d, i, j] -> images [1, 3, h, w]."""
        return self.vqgan.decoded(entries.to(self.vqgan.dtype))[0]

    @torch.no_grad()
    def picture(self) -> Tensor:
        """The picture as it is now, uint8 [3, h, w]."""
        return to_uint8(self.vqgan.decode_codes(self.variable.codes()[None]))[0]


def clamped(images: Tensor) -> Tensor:
    """Images within [-1, 1]. What lies outside gets the gradient that would lead it back, and none
    that would lead it further away: with a plain clamp it could never return."""
    return _Clamp.apply(images)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (images,) = ctx.saved_tensors
        outward = gradient * (images - images.clamp(-1, 1)) < 0  # a step goes against the gradient
        return gradient.masked_fill(outward, 0)
