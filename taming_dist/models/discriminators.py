"""Discriminators of the GAN loss. Source: arXiv 1611.07004 (PatchGAN), as used in 2012.09841.

Parameter names are those of the original implementation's `loss.discriminator.*`.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from taming_dist.errors import UserError

Average = Callable[[Tensor], Tensor]


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch statistics may be averaged over ranks.

    `average` is a differentiable mean over all ranks; models know no ranks, so whoever trains the
    network sets it (see `average_statistics`). Running statistics move only while `track` is true:
    in the discriminator's own pass, not when the generator looks through it.
    """

    average: Average | None = None
    track: bool = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._normalize(x.float()).to(x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        ranks = 1
        if self.average is not None:
            moments = self.average(moments)
            ranks = getattr(self.average, "ranks", 1)
        mean, variance = moments[0], moments[1] - moments[0].square()
        if self.track:
            self._move_running(mean.detach(), variance.detach(), x.numel() // x.shape[1] * ranks)
        scale = self.weight.float() * torch.rsqrt(variance.clamp(min=0) + self.eps)
        shift = self.bias.float() - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    @torch.no_grad()
    def _move_running(self, mean: Tensor, variance: Tensor, n: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * n / max(1, n - 1), self.momentum)  # unbiased, as torch's
        self.num_batches_tracked += 1


class ActNorm(nn.Module):
    """Per-channel affine map, set from the first batch so that it comes out with mean 0, std 1.

    Source: arXiv 1807.03039, section 3.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
        self.initialized: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialized:
            self._initialize(x)
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        mean = x.mean((0, 2, 3), keepdim=True)
        std = x.transpose(0, 1).flatten(1).std(1)[None, :, None, None]
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))
        self.initialized.fill_(1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "actnorm": ActNorm,
    "group": lambda channels: nn.GroupNorm(min(32, channels), channels),
    "none": lambda channels: nn.Identity(),
}


@dataclasses.dataclass
class PatchGANConfig:
    """`channels` of the first layer, doubled up to 8 times of it over `layers` strided layers;
    `norm`: batch (as the original), actnorm, group or none."""

    channels: int = 64
    layers: int = 3
    norm: str = "batch"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"loss.discriminator.norm={self.norm}: use one of {sorted(NORMS)}")

    def smallest_size(self) -> int:
        """The smallest image side that leaves at least one logit."""
        size = 1 + 1 + 1  # two last layers of kernel 4, stride 1, padding 1 take one pixel each
        for _ in range(self.layers):
            size = 2 * size
        return size


class PatchGAN(nn.Module):
    """One logit for every overlapping patch: images [b,c,h,w] -> logits [b,1,h',w']."""

    def __init__(self, config: PatchGANConfig, image_channels: int) -> None:
        super().__init__()
        norm, width = NORMS[config.norm], config.channels
        biased = config.norm in ("actnorm", "none")  # other norms have a shift of their own
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index in range(1, config.layers + 1):
            out = config.channels * min(2**index, 8)
            stride = 2 if index < config.layers else 1
            layers.append(nn.Conv2d(width, out, 4, stride, 1, bias=biased))
            layers += [norm(out), nn.LeakyReLU(0.2)]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def average_statistics(network: nn.Module, average: Average) -> None:
    """Let every BatchNorm of the network take its statistics over all ranks."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.average = average


def track_statistics(network: nn.Module, track: bool) -> None:
    """Whether the running statistics of the network's BatchNorms move."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.track = track


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of logits on the right side of 0, for real and generated patches together."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
