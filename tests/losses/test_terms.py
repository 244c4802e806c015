"""The terms of the reconstruction loss against their closed forms, and their sum."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.reconstruction import ReconstructionLoss
from taming_dist.losses.terms import TERMS, L1Config, L2Config, PerceptualConfig, TermConfig

X = torch.tensor([[[[1.0, -1.0], [0.0, 0.5]]]])
CONF = Path(__file__).parents[2] / "conf"


class Small:
    """A frozen network in place of VGG16."""

    def lpips_network(self, net: str, weights: str) -> LPIPS:
        torch.manual_seed(0)
        return LPIPS([nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())], [torch.rand(8)])


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_l1_is_the_mean_absolute_difference() -> None:
    assert L1Config().build(Small())(X, torch.zeros_like(X)).item() == pytest.approx(2.5 / 4)


def test_l2_is_the_mean_squared_difference() -> None:
    assert L2Config().build(Small())(X, torch.zeros_like(X)).item() == pytest.approx(2.25 / 4)


def test_the_perceptual_term_is_the_mean_of_lpips_over_the_images() -> None:
    term = PerceptualConfig().build(Small())
    expected = term.lpips(images(0), images(1)).mean()
    torch.testing.assert_close(term(images(0), images(1)), expected)


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_is_computed_in_fp32(kind: str) -> None:
    term = TERMS[kind]().build(Small())
    x, y = images(0).bfloat16(), images(1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = term(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, term(x.float(), y.float()))


def test_the_loss_is_the_weighted_sum_of_the_values_that_it_gives() -> None:
    terms = {"l1": L1Config(0.3), "l2": L2Config(2.0), "perceptual": PerceptualConfig(0.5)}
    loss = ReconstructionLoss(terms, Small())
    total, values = loss(images(0), images(1))
    difference = images(0) - images(1)
    assert values["l1"] == pytest.approx(difference.abs().mean().item())
    assert values["l2"] == pytest.approx(difference.square().mean().item())
    expected = 0.3 * values["l1"] + 2 * values["l2"] + 0.5 * values["perceptual"]
    torch.testing.assert_close(total, expected)


def test_a_term_without_a_weight_computes_nothing() -> None:
    loss = ReconstructionLoss({"l1": L1Config(), "perceptual": PerceptualConfig(0.0)}, Small())
    loss.terms[1].lpips.register_forward_pre_hook(refuse)
    total, values = loss(images(0), images(1))
    assert values.keys() == {"l1"}
    assert torch.equal(total, values["l1"])


def refuse(*_: Any) -> None:
    raise AssertionError("LPIPS was computed")


def test_a_term_may_be_there_twice_with_other_settings() -> None:
    terms: dict[str, TermConfig] = {"l1": L1Config(), "l1_more": L1Config(2.0)}
    total, values = ReconstructionLoss(terms, Small())(images(0), images(1))
    torch.testing.assert_close(total, 3 * values["l1"])


def test_every_term_has_its_yaml() -> None:
    assert {path.stem for path in (CONF / "loss/terms").glob("*.yaml")} == set(TERMS)
