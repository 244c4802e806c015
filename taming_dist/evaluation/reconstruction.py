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

from taming_dist.evaluation.ssim import ssim as similarity
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.tokens import unigram_entropy
from taming_dist.models.quantizers.interface import count


class ReconstructionMetrics:
    """Sums over batches, and the metrics that follow from them.

    Each rank feeds its own images; `sums` is one fp64 tensor, so that adding it over the ranks
    (one all-reduce) makes `compute` give the metrics of the whole set. Without `lpips`, a network
    or several by the names of their metrics, the perceptual metrics are left out; without
    `mean_colour` the floor, which is the same every time that a fixed set is evaluated; without
    `ssim`, which images of fewer than 11 pixels do not have, the structural similarity.
    `higher_is_better`: of the metrics that can tell models apart, by name.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "lpips": False,
        "psnr": True,
        "codebook_usage": True,
        "codebook_perplexity": True,
    }

    def __init__(
        self,
        vocabulary: int,
        lpips: LPIPS | Mapping[str, LPIPS] | None = None,
        mean_colour: bool = True,
        ssim: bool = False,
    ) -> None:
        networks = {"lpips": lpips} if isinstance(lpips, LPIPS) else lpips
        self.networks: Mapping[str, LPIPS] = networks or {}
        self.mean_colour, self.ssim = mean_colour, ssim
        # images, pixel values, then per prediction: squared error, similarity, and the distance by
        # each network; then uses per code
        self._facts = 2 + len(self.networks)
        self._codes = 2 + 2 * self._facts
        self.sums = torch.zeros(self._codes + vocabulary, dtype=torch.float64)

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add images and reconstructions [b, c, h, w], about [-1, 1], codes [b, *shape].

        Reconstructions are clamped to [-1, 1] first, as they are when they are written to a file.
        """
        self.sums = self.sums.to(images.device)
        images = images.float()
        predictions = [reconstructions.float().clamp(-1, 1)]
        if self.mean_colour:
            predictions.append(images.mean((2, 3), keepdim=True).expand_as(images))
        features = [network.features(images) for network in self.networks.values()]
        self.sums[0] += len(images)
        self.sums[1] += images.numel()
        for sums, prediction in zip(self._predictions(), predictions, strict=False):
            # the error of pixels in [0, 1] is half of that in [-1, 1]
            sums[0] += ((images - prediction) / 2).square().sum(dtype=torch.float64)
            if self.ssim:
                sums[1] += similarity((images + 1) / 2, (prediction + 1) / 2).sum()
            for slot, network in enumerate(self.networks.values()):
                distances = network(images, prediction, features[slot])
                sums[2 + slot] += distances.sum(dtype=torch.float64)
        self.code_counts.add_(count(codes, len(self.code_counts)))

    @property
    def code_counts(self) -> Tensor:
        """How often each code was used, fp64 [K]: a part of `sums`."""
        return self.sums[self._codes :]

    def compute(self) -> dict[str, float]:
        """Return the metrics of all images seen: PSNR in dB, SSIM and LPIPS per image, codebook
        usage.

        `codebook_usage` is the fraction of the codes that occur, `codebook_perplexity` the number
        of equally frequent codes with the same entropy.
        """
        images, values = self.sums[:2]
        assert images > 0, "no batch was given"
        metrics = {}
        names = ("", "_mean_colour")[: 1 + self.mean_colour]
        for sums, name in zip(self._predictions(), names, strict=False):
            metrics[f"val_psnr{name}"] = _psnr(float(sums[0] / values))
            if self.ssim:
                metrics[f"val_ssim{name}"] = float(sums[1] / images)
            for slot, metric in enumerate(self.networks):
                metrics[f"val_{metric}{name}"] = float(sums[2 + slot] / images)
        return metrics | codebook_use(self.code_counts)

    def _predictions(self) -> tuple[Tensor, ...]:
        """The sums of each prediction, as views."""
        return self.sums[2 : self._codes].split(self._facts)


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Share of the codes that occur, and perplexity, of how often each was used [K]."""
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_perplexity": math.exp(unigram_entropy(counts)),
    }


def _psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; infinite for a perfect reconstruction."""
    return -10 * math.log10(mean_squared_error) if mean_squared_error > 0 else math.inf
