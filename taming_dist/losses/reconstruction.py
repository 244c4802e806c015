"""Losses between images and their reconstructions; results in fp32."""

from collections.abc import Mapping
from types import MappingProxyType

import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.losses.terms import Networks, ProjectedTerm, TermConfig


class ReconstructionLoss(nn.Module):
    """The weighted sum of terms: of |x - x^| and LPIPS(x, x^), say (arXiv 2012.09841, 3.1)."""

    def __init__(self, terms: Mapping[str, TermConfig], networks: Networks) -> None:
        """`terms` by the name under which each is logged; `networks`: `taming_dist.pretrained`."""
        super().__init__()
        self.weights = {name: config.weight for name, config in terms.items()}
        self._looks_into = {name: config.looks_into for name, config in terms.items()}
        self.terms = nn.ModuleList(config.build(networks) for config in terms.values())

    @property
    def projections(self) -> dict[str, tuple[str, int]]:
        """The projections that `forward` needs, by the names of their terms: what of the model, and
        to how many channels."""
        terms = zip(self._looks_into.items(), self.terms, strict=True)
        return {
            name: (source, term.width)
            for (name, source), term in terms
            if isinstance(term, ProjectedTerm)
        }

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        reconstructions: Float[Tensor, "b c h w"],
        projected: Mapping[str, Float[Tensor, "b _ i j"]] = MappingProxyType({}),
    ) -> tuple[Float32[Tensor, ""], dict[str, Float32[Tensor, ""]]]:
        """The sum, and the value of each term that has a weight, by its name.

        Images and reconstructions are about [-1, 1]; `projected`: trained linear maps, for
        the terms in `projections`. Nothing is computed for a weight of 0.
        """
        values = {
            name: term(images, projected.get(name, reconstructions))
            for (name, weight), term in zip(self.weights.items(), self.terms, strict=True)
            if weight > 0
        }
        total = sum(self.weights[name] * value for name, value in values.items())
        assert isinstance(total, Tensor), "a loss has at least one term"
        return total, values


def label_map_bce(
    labels: Float[Tensor, "b v h w"], logits: Float[Tensor, "b v h w"]
) -> Float32[Tensor, ""]:
    """Binary cross-entropy of every channel of one-hot label maps, mean over all elements: the
    original's loss for label maps."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
