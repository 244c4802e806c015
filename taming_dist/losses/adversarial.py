"""The GAN loss and its adaptive weight. Source: arXiv 2012.09841, section 3.1, equations 5 to 7.

Legend: logits [b,1,h,w] of a discriminator, real or fake (= for reconstructions); all in fp32.
"""

import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4  # delta of equation 7, the value of the original's code
LARGEST_WEIGHT = 1e4


def hinge_generator(fake: Tensor) -> Tensor:
    """-E[D(x^)]."""
    return -fake.float().mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(E[max(0, 1 - D(x))] + E[max(0, 1 + D(x^))]) / 2. Source: arXiv 1705.02894."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(rec_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """Equation 7: lambda = ||d rec / d W|| / (||d gan / d W|| + 1e-4), clamped to [0, 1e4].

    Both gradients are those of the decoder's last convolution W, any shape; gives a scalar.
    """
    ratio = rec_gradient.norm() / (gan_gradient.norm() + EPSILON)
    return ratio.clamp(0, LARGEST_WEIGHT).detach()
