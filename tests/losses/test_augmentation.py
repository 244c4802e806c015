"""Differentiable augmentation against slow obvious versions."""

import pytest
import torch
from torch import Tensor

from taming_dist.losses.augmentation import DRAWS, POLICIES, color, cutout, diffaug, translation


def draws(**columns: float) -> Tensor:
    """One row of draws; columns by their index, the rest 0.5."""
    row = torch.full((1, DRAWS), 0.5)
    for name, value in columns.items():
        row[0, int(name[1:])] = value
    return row


@pytest.fixture
def images() -> Tensor:
    return torch.randn(1, 3, 8, 16, generator=torch.Generator().manual_seed(0))


def test_colour_in_the_middle_of_its_range_changes_nothing(images: Tensor) -> None:
    torch.testing.assert_close(color(images, draws()), images)


def test_colour_shifts_greys_and_scales(images: Tensor) -> None:
    torch.testing.assert_close(color(images, draws(_0=1.0)), images + 0.5)
    grey = images.mean(1, keepdim=True).expand_as(images)
    torch.testing.assert_close(color(images, draws(_1=0.0)), grey)
    expected = (images - images.mean()) * 1.5 + images.mean()
    torch.testing.assert_close(color(images, draws(_2=1.0)), expected)


def test_translation_shifts_and_fills_with_zeros(images: Tensor) -> None:
    found = translation(images, draws(_3=0.99, _4=0.0))  # 1 row up, 2 columns to the right
    expected = torch.zeros_like(images)
    expected[:, :, :-1, 2:] = images[:, :, 1:, :-2]
    assert torch.equal(found, expected)
    assert torch.equal(translation(images, draws()), images)


def test_cutout_makes_a_hole_of_half_of_either_side(images: Tensor) -> None:
    found = cutout(images, draws(_5=0.5, _6=0.0))
    expected = images.clone()
    expected[:, :, 2:6, :4] = 0  # centred at row 4 and column 0, where half of it falls off
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_flow_to_what_is_still_seen(images: Tensor, name: str) -> None:
    leaf = images.clone().requires_grad_(True)
    row = torch.rand(1, DRAWS, generator=torch.Generator().manual_seed(1))
    diffaug(leaf, row, [name]).square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.count_nonzero() >= leaf.numel() / 2


def test_every_image_has_its_own_draws_and_equal_draws_give_equal_images(images: Tensor) -> None:
    twice = images.expand(2, -1, -1, -1)
    rows = torch.rand(2, DRAWS, generator=torch.Generator().manual_seed(2))
    found = diffaug(twice, rows, list(POLICIES))
    assert not torch.equal(found[0], found[1])
    alone = diffaug(images, rows[1:], list(POLICIES))
    torch.testing.assert_close(found[1:], alone)


def test_without_policies_images_stay_as_they_are(images: Tensor) -> None:
    assert diffaug(images, draws(), []) is images
