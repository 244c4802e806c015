"""How well a first stage reconstructs label maps, and how it uses its codebook.

Legend: b batch, v classes, h w pixels, i j latent grid.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from taming_dist.evaluation.reconstruction import codebook_use
from taming_dist.losses.reconstruction import label_map_bce
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
        self._codes = 2 + 3 * classes
        self.sums = torch.zeros(self._codes + vocabulary, dtype=torch.float64)

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add one-hot maps [b,v,h,w], logits [b,v,h,w] and codes [b,*shape]."""
        self.sums = self.sums.to(images.device)
        truth, taken = images.argmax(1).flatten(), reconstructions.argmax(1).flatten()
        right, ones = (truth == taken).double(), torch.ones_like(truth, dtype=torch.float64)
        self.sums[0] += len(images)
        self.sums[1] += label_map_bce(images, reconstructions) * len(images)
        # not by masks and `bincount`, for which the host waits
        pixels = self.sums[2 : self._codes].chunk(3)
        for sums, which, many in zip(
            pixels, (truth, truth, taken), (right, ones, ones), strict=True
        ):
            sums.index_add_(0, which, many)
        self.code_counts.add_(count(codes, len(self.code_counts)))

    @property
    def code_counts(self) -> Tensor:
        """How often each code was used, fp64 [K]: a part of `sums`."""
        return self.sums[self._codes :]

    def compute(self) -> dict[str, float]:
        """Cross-entropy, share of pixels right, intersection over union averaged over the classes
        that occur or were found, codebook usage and perplexity (as `ReconstructionMetrics`)."""
        assert self.sums[0] > 0, "no batch was given"
        right, truth, taken = self.sums[2 : self._codes].reshape(3, -1)
        union = truth + taken - right
        there = union > 0
        return {
            "val_bce": float(self.sums[1] / self.sums[0]),
            "val_pixel_accuracy": float(right.sum() / truth.sum()),
            "val_mean_iou": float((right[there] / union[there]).mean()),
            **codebook_use(self.code_counts),
        }
