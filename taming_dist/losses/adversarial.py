"""GAN losses, what steadies them, and the adaptive weight. Source: arXiv 2012.09841, section 3.1.

Legend: b batch, c channels, h w pixels; real or fake (= for reconstructions): logits of a
discriminator, any number for an image. All is computed in fp32.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

EPSILON = 1e-4  # delta of equation 7, the value of the original's code
LARGEST_WEIGHT = 1e4


class GANLoss(Protocol):
    """A pair of losses."""

    def generator(self, fake: Float[Tensor, "b ..."]) -> Float32[Tensor, ""]: ...
    def discriminator(
        self, real: Float[Tensor, "b ..."], fake: Float[Tensor, "b ..."]
    ) -> Float32[Tensor, ""]: ...


class Hinge:
    """The margin of arXiv 1705.02894: the original's default."""

    def generator(self, fake: Float[Tensor, "b ..."]) -> Float32[Tensor, ""]:
        """-E[D(x^)]."""
        return -fake.float().mean()

    def discriminator(
        self, real: Float[Tensor, "b ..."], fake: Float[Tensor, "b ..."]
    ) -> Float32[Tensor, ""]:
        """(E[max(0, 1 - D(x))] + E[max(0, 1 + D(x^))]) / 2."""
        return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


class Vanilla(Hinge):
    """Cross-entropy for D, -E[D(x^)] for G: the original's `disc_loss: vanilla`."""

    def discriminator(
        self, real: Float[Tensor, "b ..."], fake: Float[Tensor, "b ..."]
    ) -> Float32[Tensor, ""]:
        """(E[-log s(D(x))] + E[-log(1 - s(D(x^)))]) / 2, s the logistic function."""
        return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


class NonSaturating(Vanilla):
    """Cross-entropy for both. Source: arXiv 1406.2661, section 3."""

    def generator(self, fake: Float[Tensor, "b ..."]) -> Float32[Tensor, ""]:
        """E[-log s(D(x^))]."""
        return F.softplus(-fake.float()).mean()


GAN_LOSSES: dict[str, GANLoss] = {
    "hinge": Hinge(),
    "vanilla": Vanilla(),
    "non_saturating": NonSaturating(),
}


def gradient_penalty(
    real: Float[Tensor, "b ..."], images: Float[Tensor, "b c h w"]
) -> Float32[Tensor, ""]:
    """R1: E[||d D(x) / d x||^2] / 2, to be differentiated once more. Source: arXiv 1801.04406, 9.

    real: logits for the images, which require a gradient; a D with many logits for an image
    is judged by their mean.
    """
    judged = real.float().flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(judged, images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2


def lecam(
    real: Float[Tensor, "b ..."], fake: Float[Tensor, "b ..."], averages: Float32[Tensor, "2"]
) -> Float32[Tensor, ""]:
    """E[max(0, D(x) - a_fake)^2] + E[max(0, a_real - D(x^))^2]. Source: arXiv 2104.03310, 4.

    averages: moving averages a_real, a_fake of D's logits. One-sided, as its authors' code.
    """
    above = F.relu(real.float() - averages[1]).square().mean()
    below = F.relu(averages[0] - fake.float()).square().mean()
    return above + below


def adaptive_weight(
    rec_gradient: Float32[Tensor, "*size"],
    gan_gradient: Float32[Tensor, "*size"],
    smallest: float = 0.0,
    largest: float = LARGEST_WEIGHT,
) -> Float32[Tensor, ""]:
    """Equation 7: lambda = ||d rec / d W|| / (||d gan / d W|| + 1e-4), clamped.

    Both gradients are those of the decoder's last convolution W.
    """
    ratio = rec_gradient.norm() / (gan_gradient.norm() + EPSILON)
    return ratio.clamp(smallest, largest).detach()
