"""The entropy term of quantizers that say how likely every code is for a vector.

Source: arXiv 2310.05737, section 3.2; arXiv 2412.02692 takes it over.
Legend: K codes; q(c|z) the probability of code c for the vector z.
"""

from jaxtyping import Float32
from torch import Tensor

from taming_dist.models.quantizers.interface import Quantizer


class EntropyQuantizer(Quantizer):
    """A quantizer whose loss in training has the term E[H(q(z))] - `diversity` * H(E[q(z)]): each
    vector sure of its code, all codes in use."""

    entropy_weight: float
    diversity: float

    def entropy_term(
        self, of_each: Float32[Tensor, ""], mean: Float32[Tensor, "..."]
    ) -> Float32[Tensor, ""]:
        """The weighted term from E[H(q(z))] and E[q(z)] on this rank; the latter, whole or as its
        independent factors, is averaged over all ranks first."""
        if self.average is not None:
            mean = self.average(mean)
        return self.entropy_weight * (of_each - self.diversity * entropy(mean))


def entropy(p: Float32[Tensor, "..."]) -> Float32[Tensor, ""]:
    """Entropy of a distribution in nats, or of several that are independent; a probability of 0
    adds nothing."""
    return -(p * p.clamp(min=1e-12).log()).sum()
