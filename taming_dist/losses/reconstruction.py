"""Pixel losses between images and their reconstructions. Images in [-1, 1]; results in fp32."""

import torch.nn.functional as F
from torch import Tensor


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute difference over all elements: the pixel term of arXiv 2012.09841's code."""
    return (images.float() - reconstructions.float()).abs().mean()


def l2(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared difference over all elements: the pixel term of arXiv 2012.09841, equation 4."""
    return (images.float() - reconstructions.float()).square().mean()


def label_map_bce(labels: Tensor, logits: Tensor) -> Tensor:
    """Binary cross-entropy of every channel of one-hot label maps [b,v,h,w], mean over all
    elements: the original's loss for label maps."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
