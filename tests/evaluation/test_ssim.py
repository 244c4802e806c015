"""Structural similarity: scikit-image's own figure, and what it has to be of itself."""

import pytest
import torch
from skimage.metrics import structural_similarity

from taming_dist.evaluation.ssim import ssim


def test_it_is_that_of_scikit_image() -> None:
    one = torch.rand(3, 3, 24, 19, generator=torch.Generator().manual_seed(0))
    other = (one + 0.2 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    for found, x, y in zip(ssim(one, other), one.double(), other.double(), strict=True):
        expected = structural_similarity(
            x.numpy(),
            y.numpy(),
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(found) == pytest.approx(expected, abs=1e-6)


def test_an_image_is_most_similar_to_itself() -> None:
    image = torch.rand(1, 1, 11, 11, generator=torch.Generator().manual_seed(0))
    assert float(ssim(image, image)) == pytest.approx(1)
    assert float(ssim(image, 1 - image)) < 0.5
