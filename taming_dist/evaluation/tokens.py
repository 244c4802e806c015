"""How well a second stage predicts a set of codes. Source: arXiv 2012.09841, equation 11.

Legend: b batch, n tokens, v vocabulary, h w pixels.
"""

import math

import torch
from torch import Tensor

from taming_dist.losses.tokens import unigram_entropy
from taming_dist.models.prior.head import Judged
from taming_dist.models.prior.schemes import LIKELIHOOD
from taming_dist.models.prior.transformer import TransformerConfig

COLOURS = 3  # numbers of a pixel
DIGITS = 5  # after the point, of what there are hundreds of


class TokenMetrics:
    """Sums over batches of codes, and the metrics that follow from them.

    `sums` is one fp64 tensor that may be added over the ranks (one all-reduce) before `compute`.
    """

    def __init__(
        self, vocabulary: int, tokens: int, measure: str = "nll", dimensions: int | None = None
    ) -> None:
        """`tokens`: n, those of an image. `measure`: the name of the negative log-likelihood, see
        `Scheme.measure`. `dimensions`: the numbers that an image has, 3 h w; None where that is not
        known, or the likelihoods of an image's tokens do not add up to its own."""
        self.measure, self.tokens, self.dimensions = measure, tokens, dimensions
        # tokens predicted right; in the order of the sequence summed negative log-likelihoods, and
        # how many; uses per code
        self.sums = torch.zeros(1 + 2 * tokens + vocabulary, dtype=torch.float64)

    @torch.no_grad()
    def update(self, judged: Judged, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add how a model judged targets [b, n] int64; weights [b, n]: how much each token counts,
        None for all alike."""
        self.sums = self.sums.to(targets.device)
        right, nll, counts, codes = self._parts()
        each, hits = judged.nll.double(), judged.hits
        counted = torch.ones_like(each) if weights is None else weights.to(each.dtype)
        right += (hits * counted).sum()
        nll += (each * counted).sum(0)
        counts += counted.sum(0)
        codes.index_add_(0, targets.flatten(), counted.flatten())

    def compute(self) -> dict[str, float | list[float]]:
        """Return the metrics, in nats per token where no other unit is given.

        `val_nll` (or as the `measure` is called); `unigram_entropy`, which it has to stay below;
        `val_accuracy`, the share of tokens whose likeliest code is the right one;
        `val_nll_by_position`, the mean of each of the n tokens in the order of the sequence (NaN of
        one that never counted); with `dimensions` `val_bits_per_dim`, the bits of all codes of an
        image, per number of the image: n val_nll / (3 h w ln 2). That is the rate of a code for the
        images' codes, not a likelihood of pixels, which the decoder does not give.
        """
        right, nll, counts, codes = self._parts()
        assert counts.sum() > 0, "no batch was given"
        mean = float(nll.sum() / counts.sum())
        found: dict[str, float | list[float]] = {
            f"val_{self.measure}": mean,
            "val_accuracy": float(right / counts.sum()),
            "unigram_entropy": float(unigram_entropy(codes)),
        }
        if self.dimensions is not None:
            found["val_bits_per_dim"] = self.tokens * mean / (self.dimensions * math.log(2))
        by_position = (nll / counts).tolist()
        found[f"val_{self.measure}_by_position"] = [round(value, DIGITS) for value in by_position]
        return found

    def _parts(self) -> list[Tensor]:
        """The parts of `sums`, as views."""
        right, nll, counts, codes = self.sums.split(
            [1, self.tokens, self.tokens, len(self.sums) - 1 - 2 * self.tokens]
        )
        return [right, nll, counts, codes]


class NllByClass:
    """Negative log-likelihoods by the class of the images; `sums` as those of `TokenMetrics`, whose
    `measure`, `tokens` and `dimensions` these are."""

    def __init__(self, classes: int, metrics: TokenMetrics) -> None:
        self.metrics = metrics
        # summed negative log-likelihoods of each class, how many, and images
        self.sums = torch.zeros(3, classes, dtype=torch.float64)

    @torch.no_grad()
    def update(self, judged: Judged, classes: Tensor, weights: Tensor | None = None) -> None:
        """Add how a model judged images of classes [b] int64; weights as in `TokenMetrics`."""
        each = judged.nll.double()
        counted = torch.ones_like(each) if weights is None else weights.to(each.dtype)
        nll, tokens = (each * counted).sum(1), counted.sum(1)
        of_images = torch.stack([nll, tokens, torch.ones_like(nll)])
        self.sums = self.sums.to(each.device)
        self.sums.index_add_(1, classes.to(each.device), of_images)

    def compute(self) -> dict[str, list[float] | list[int]]:
        """Return `val_nll_by_class` (or as the measure is called), nats per token of each class in
        the order of their numbers (NaN of one that does not occur), where there is one for all of
        them, `val_bits_per_dim_by_class`, and of how many images these are,
        `val_images_by_class`."""
        summed, tokens, images = self.sums
        nll = summed / tokens
        found = {f"val_{self.metrics.measure}_by_class": nll}
        if self.metrics.dimensions is not None:
            bits = self.metrics.tokens / (self.metrics.dimensions * math.log(2))
            found["val_bits_per_dim_by_class"] = nll * bits
        rounded = {
            name: [round(value, DIGITS) for value in values.tolist()]
            for name, values in found.items()
        }
        return rounded | {"val_images_by_class": images.long().tolist()}


def token_metrics(model: TransformerConfig, image_size: int | None) -> TokenMetrics:
    """Return what is measured of a model; its images are square, of so many pixels a side (None:
    that is not known)."""
    measure, dimensions = model.scheme.measure, None
    if measure == LIKELIHOOD and image_size is not None:
        dimensions = COLOURS * image_size**2
    return TokenMetrics(model.vocabulary, model.num_tokens, measure, dimensions)
