"""How well a first stage reconstructs a set of images, and how it uses its codebook.

The error is taken over all pixels of the set before it becomes a PSNR. Predicting each crop by its
own mean colour is the floor that every model has to clear. Source of the perceptual distance:
arXiv 1801.03924; of the codebook perplexity: arXiv 1711.00937, section 4.

Legend: b batch, c channels, h w pixels, i j latent grid, v vocabulary.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.tokens import unigram_entropy
from taming_dist.models.quantizers.interface import count


class ReconstructionMetrics:
    """Sums over batches, and the metrics that follow from them.

    Each rank feeds its own images; `sums` is one fp64 tensor, so that adding it over the ranks
    (one all-reduce) makes `compute` give the metrics of the whole set. Without `lpips` the
    perceptual metrics are left out; without `mean_colour`, the floor, which is the same every
    time that a fixed set is evaluated. `higher_is_better`: of the metrics that can tell models
    apart, by name.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "lpips": False,
        "psnr": True,
        "codebook_usage": True,
        "codebook_perplexity": True,
    }

    def __init__(
        self, vocabulary: int, lpips: LPIPS | None = None, mean_colour: bool = True
    ) -> None:
        self.lpips = lpips
        self.mean_colour = mean_colour
        # images, pixel values, then per prediction: squared error, distance; then uses per code
        self.sums = torch.zeros(6 + vocabulary, dtype=torch.float64)

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add images and reconstructions [b, c, h, w], about [-1, 1], and codes [b, i, j].

        Reconstructions are clamped to [-1, 1] first, as they are when they are written to a file.
        """
        self.sums = self.sums.to(images.device)
        images = images.float()
        predictions = [reconstructions.float().clamp(-1, 1)]
        if self.mean_colour:
            predictions.append(images.mean((2, 3), keepdim=True).expand_as(images))
        features = None if self.lpips is None else self.lpips.features(images)
        self.sums[0] += len(images)
        self.sums[1] += images.numel()
        for slot, prediction in zip((2, 4), predictions, strict=False):
            # the error of pixels in [0, 1] is half of that in [-1, 1]
            self.sums[slot] += ((images - prediction) / 2).square().sum(dtype=torch.float64)
            if self.lpips is not None:
                distances = self.lpips(images, prediction, features)
                self.sums[slot + 1] += distances.sum(dtype=torch.float64)
        self.sums[6:] += count(codes, len(self.sums) - 6)

    def compute(self) -> dict[str, float]:
        """Return the metrics of all images seen: PSNR in dB, LPIPS per image, codebook usage.

        `codebook_usage` is the fraction of the codes that occur, `codebook_perplexity` the number
        of equally frequent codes with the same entropy.
        """
        assert self.sums[0] > 0, "no batch was given"
        metrics = {}
        for slot, name in ((2, ""), (4, "_mean_colour"))[: 1 + self.mean_colour]:
            metrics[f"val_psnr{name}"] = _psnr(float(self.sums[slot] / self.sums[1]))
            if self.lpips is not None:
                metrics[f"val_lpips{name}"] = float(self.sums[slot + 1] / self.sums[0])
        counts = self.sums[6:]
        metrics["codebook_usage"] = float((counts > 0).double().mean())
        metrics["codebook_perplexity"] = math.exp(unigram_entropy(counts))
        return metrics


def _psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; infinite for a perfect reconstruction."""
    return -10 * math.log10(mean_squared_error) if mean_squared_error > 0 else math.inf
