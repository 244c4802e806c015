"""Normalisation inside discriminators, with statistics that may be taken over all ranks.

Models know no ranks: whoever trains the network gives it `average`, a differentiable mean over
ranks (see `average_statistics`).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.exact import without_autocast

Average = Callable[[Tensor], Tensor]
Assign = Callable[[nn.Parameter, Tensor], None]


class Averaged(nn.Module):
    """A layer whose batch statistics are averaged over ranks where `average` is set."""

    average: Average | None = None

    def over_ranks(self, statistic: Float32[Tensor, "*size"]) -> Float32[Tensor, "*size"]:
        """The mean of a statistic over ranks; differentiable."""
        return statistic if self.average is None else self.average(statistic)

    @property
    def ranks(self) -> int:
        return getattr(self.average, "ranks", 1)


class BatchNorm(nn.BatchNorm2d, Averaged):
    """BatchNorm2d with the batch statistics of all ranks.

    Running statistics move only while `track` is true: in the discriminator's own pass, not when
    the generator looks through it (see `track_statistics`).
    """

    track: bool = True

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training:
            return super().forward(x)
        with without_autocast(x.device):
            return self._normalize(x.float()).to(x.dtype)

    def _normalize(self, x: Float32[Tensor, "b c h w"]) -> Float32[Tensor, "b c h w"]:
        moments = self.over_ranks(torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))]))
        mean, variance = moments[0], moments[1] - moments[0].square()
        if self.track:
            n = x.numel() // x.shape[1] * self.ranks
            self._move_running(mean.detach(), variance.detach(), n)
        scale = self.weight.float() * torch.rsqrt(variance.clamp(min=0) + self.eps)
        shift = self.bias.float() - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    @torch.no_grad()
    def _move_running(
        self, mean: Float32[Tensor, "c"], variance: Float32[Tensor, "c"], n: int
    ) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        variance = variance * n / max(1, n - 1)  # unbiased, as torch's
        finite = (mean + variance).isfinite()  # else the step is skipped, and its batch left out
        self.running_mean.lerp_(mean.where(finite, self.running_mean), self.momentum)
        self.running_var.lerp_(variance.where(finite, self.running_var), self.momentum)
        self.num_batches_tracked += 1


class ActNorm(Averaged):
    """Per-channel affine map; `initialize_actnorm` sets it so that the first batch comes out with
    mean 0 and deviation 1. Source: arXiv 1807.03039, section 3.1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
        self.initialized: Tensor

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.scale * (x + self.loc)

    def statistics(
        self, x: Float32[Tensor, "b c h w"]
    ) -> tuple[Float32[Tensor, "1 c 1 1"], Float32[Tensor, "1 c 1 1"]]:
        """`loc` and `scale` for the batches x of all ranks together."""
        mean = self.over_ranks(x.mean((0, 2, 3), keepdim=True))
        variance = self.over_ranks((x - mean).square().mean((0, 2, 3), keepdim=True))
        n = x.numel() // x.shape[1] * self.ranks
        return -mean, 1 / ((variance * n / (n - 1)).sqrt() + 1e-6)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "actnorm": ActNorm,
    "group": lambda channels: nn.GroupNorm(min(32, channels), channels),
    "none": lambda channels: nn.Identity(),
}


def average_statistics(network: nn.Module, average: Average) -> None:
    """Let every layer of the network take its batch statistics over all ranks."""
    for module in network.modules():
        if isinstance(module, Averaged):
            module.average = average


def sees_batches(network: nn.Module) -> bool:
    """Whether what it says of an image depends on the others of the micro-batch (ActNorm's first
    one apart)."""
    modules = network.modules()
    return any(isinstance(m, Averaged) and not isinstance(m, ActNorm) for m in modules)


def track_statistics(network: nn.Module, track: bool) -> None:
    """Whether numbers that follow the batches (BatchNorm's, spectral norm's) move."""
    for module in network.modules():
        if hasattr(module, "track"):
            module.track = track  # type: ignore[assignment]


def set_in_place(parameter: nn.Parameter, value: Float[Tensor, "*size"]) -> None:
    """How a parameter of a plain network is set; an engine has its own way."""
    parameter.data.copy_(value)


@torch.no_grad()
def initialize_actnorm(
    network: nn.Module, images: Float[Tensor, "b c h w"], assign: Assign = set_in_place
) -> bool:
    """Set every ActNorm that was never set from a first batch; True if there was one.

    Each layer sees what those before it give once they are set. Values are assigned after the
    pass, because under ZeRO-3 what a forward writes into its parameters is lost.
    """
    found: list[tuple[ActNorm, Tensor, Tensor]] = []

    def measure(layer: ActNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        loc, scale = layer.statistics(inputs[0].float())
        found.append((layer, loc, scale))
        return (scale * (inputs[0].float() + loc)).to(output.dtype)

    fresh = [m for m in network.modules() if isinstance(m, ActNorm) and not m.initialized]
    if not fresh:
        return False
    hooks = [layer.register_forward_hook(measure) for layer in fresh]
    network(images)
    for hook in hooks:
        hook.remove()
    for layer, loc, scale in found:
        assign(layer.loc, loc)
        assign(layer.scale, scale)
        layer.initialized.fill_(1)
    return True
