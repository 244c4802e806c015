"""The random changes of cut-outs."""

import torch

from taming_dist.guiding.views import Views, recoloured


def drawn(views: Views, seed: int = 0) -> torch.Tensor:
    picture = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(9))
    return views(picture, torch.Generator().manual_seed(seed))


def test_a_seed_draws_the_same_views_and_another_one_others() -> None:
    views = Views(8, 3)
    assert drawn(views).shape == (3, 3, 8, 8)
    assert drawn(views).equal(drawn(views))
    assert not drawn(views).equal(drawn(views, seed=1))


def test_without_changes_cut_outs_have_the_colours_of_the_picture_and_are_whole_at_1() -> None:
    found = drawn(Views(12, 2, smallest=1.0, strength=0.0))
    assert found.min() >= 0
    assert found.max() <= 1
    picture = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(9))
    means = picture.mean()
    assert (found.mean((1, 2, 3)) - means).abs().max() < 0.1


def test_changes_of_a_picture_of_one_colour_are_small() -> None:
    found = Views(16, 64)(torch.full((1, 3, 20, 20), 0.5), torch.Generator().manual_seed(0))
    means = found.mean((1, 2, 3))
    assert (means - 0.5).abs().max() < 0.11  # brightness, by a fifth at most
    assert means.std() > 0.02
    assert found.std((1, 2, 3)).max() < 0.12  # noise, and no dark corners from turning


def test_colours_are_recoloured_one_way_after_the_other() -> None:
    cutouts, one = torch.rand(2, 3, 4, 4), torch.ones(2)
    torch.testing.assert_close(recoloured(cutouts, one, one, one), cutouts)
    torch.testing.assert_close(recoloured(cutouts, 2 * one, one, one), 2 * cutouts)
    flat = recoloured(cutouts, one, 0 * one, one)
    torch.testing.assert_close(flat, cutouts.mean((1, 2, 3), keepdim=True).expand_as(cutouts))
    grey = recoloured(cutouts, one, one, 0 * one)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
