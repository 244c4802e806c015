"""Losses between images and their reconstructions; results in fp32."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.losses.terms import Networks, TermConfig


class ReconstructionLoss(nn.Module):
    """The weighted sum of terms: of |x - x^| and LPIPS(x, x^), say (arXiv 2012.09841, 3.1)."""

    def __init__(self, terms: Mapping[str, TermConfig], networks: Networks) -> None:
        """`terms` by the name under which each is logged; `networks`: `taming_dist.pretrained`."""
        super().__init__()
        self.weights = {name: config.weight for name, config in terms.items()}
        self.terms = nn.ModuleList(config.build(networks) for config in terms.values())

    def forward(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, a scalar, and the value of each term that has a weight, by its name.

        images, reconstructions [b,c,h,w], about [-1, 1]; nothing is computed for a weight of 0.
        """
        values = {
            name: term(images, reconstructions)
            for (name, weight), term in zip(self.weights.items(), self.terms, strict=True)
            if weight > 0
        }
        total = sum(self.weights[name] * value for name, value in values.items())
        assert isinstance(total, Tensor), "a loss has at least one term"
        return total, values


def label_map_bce(labels: Tensor, logits: Tensor) -> Tensor:
    """Binary cross-entropy of every channel of one-hot label maps [b,v,h,w], mean over all
    elements: the original's loss for label maps."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
