"""How well a first stage reconstructs label maps, and how it uses its codebook.

Legend: b batch, v classes, h w pixels, i j latent grid.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from taming_dist.losses.reconstruction import label_map_bce
from taming_dist.losses.tokens import unigram_entropy
from taming_dist.models.quantizers.interface import count


class LabelMapMetrics:
    """Sums over batches, and the metrics that follow from them; see `ReconstructionMetrics`."""

    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "bce": False,
        "pixel_accuracy": True,
        "mean_iou": True,
        "codebook_usage": True,
        "codebook_perplexity": True,
    }

    def __init__(self, classes: int, vocabulary: int) -> None:
        self.classes = classes
        # images, cross-entropy; per class: pixels right, pixels that are it, pixels taken for it;
        # then uses per code
        self.sums = torch.zeros(2 + 3 * classes + vocabulary, dtype=torch.float64)

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add one-hot maps [b,v,h,w], logits [b,v,h,w] and codes [b,i,j]."""
        self.sums = self.sums.to(images.device)
        truth, taken = images.argmax(1).flatten(), reconstructions.argmax(1).flatten()
        right, ones = (truth == taken).double(), torch.ones_like(truth, dtype=torch.float64)
        self.sums[0] += len(images)
        self.sums[1] += label_map_bce(images, reconstructions) * len(images)
        # not by masks and `bincount`, for which the host waits
        pixels, used = self.sums[2:].tensor_split([3 * self.classes])
        for sums, which, many in zip(
            pixels.chunk(3), (truth, truth, taken), (right, ones, ones), strict=True
        ):
            sums.index_add_(0, which, many)
        used += count(codes, len(used))

    def compute(self) -> dict[str, float]:
        """Cross-entropy, share of pixels right, intersection over union averaged over the classes
        that occur or were found, codebook usage and perplexity (as `ReconstructionMetrics`)."""
        assert self.sums[0] > 0, "no batch was given"
        right, truth, taken = self.sums[2 : 2 + 3 * self.classes].reshape(3, -1)
        union = truth + taken - right
        there = union > 0
        counts = self.sums[2 + 3 * self.classes :]
        return {
            "val_bce": float(self.sums[1] / self.sums[0]),
            "val_pixel_accuracy": float(right.sum() / truth.sum()),
            "val_mean_iou": float((right[there] / union[there]).mean()),
            "codebook_usage": float((counts > 0).double().mean()),
            "codebook_perplexity": math.exp(unigram_entropy(counts)),
        }
