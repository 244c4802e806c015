"""The terms of the reconstruction loss against their closed forms, and their sum."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.reconstruction import ReconstructionLoss
from taming_dist.losses.terms import (
    TERMS,
    GramConfig,
    L1Config,
    L2Config,
    LogitsConfig,
    PerceptualConfig,
    SemanticConfig,
    TermConfig,
    VFConfig,
)

X = torch.tensor([[[[1.0, -1.0], [0.0, 0.5]]]])
CONF = Path(__file__).parents[2] / "conf"


class Stub(nn.Module):
    """What is asked of a network of timm: 8 pixels a feature, and 5 classes."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, 5)

    def forward_intermediates(self, x: Tensor, **_: Any) -> list[Tensor]:
        return [self.conv(x).sin()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).sin().mean((2, 3)))


class Small:
    """Frozen networks in place of VGG16 and those of timm."""

    def timm_network(self, name: str, path: str, sha256: str, size: int) -> FrozenNetwork:
        torch.manual_seed(0)
        return FrozenNetwork(Stub(), size, 8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))

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
    if TERMS[kind].looks_into:
        y = torch.randn(2, 8, 4, 4).bfloat16()
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


def test_a_gram_matrix_has_the_products_of_every_two_channels_and_no_places() -> None:
    x, y = images(0), images(1)
    for norm in ("l1", "l2"):
        term = GramConfig(norm=norm).build(Small())
        expected = 0.0
        for a, b in zip(term.lpips.layers(x), term.lpips.layers(y), strict=True):
            pixels = a[0, 0].numel()
            for image in range(2):
                grams = []
                for f in (a[image].flatten(1), b[image].flatten(1)):
                    columns = f.unbind(1)
                    grams.append(sum(torch.outer(c, c) for c in columns) / pixels)
                difference = grams[0] - grams[1]
                if norm == "l1":
                    expected += difference.abs().sum() / len(difference) / 2
                else:
                    expected += difference.square().sum() / 2
        torch.testing.assert_close(term(x, y), expected)
        assert float(term(x, x)) == 0


def test_a_gram_loss_gives_the_reconstruction_a_gradient_and_the_image_none() -> None:
    x, y = images(0).requires_grad_(True), images(1).requires_grad_(True)
    GramConfig().build(Small())(x, y).backward()
    assert x.grad is None
    assert y.grad.isfinite().all()
    assert y.grad.count_nonzero() > 0


def test_logits_are_those_of_the_resized_and_whitened_images() -> None:
    term = LogitsConfig().build(Small())
    x, y = images(0).requires_grad_(True), images(1).requires_grad_(True)
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    logits = []
    for image in (x, y):
        large = F.interpolate(image, (224, 224), mode="bilinear", antialias=True)
        whitened = ((large + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
        logits.append(term.network.network(whitened))
    expected = (logits[0] - logits[1]).square().mean()
    torch.testing.assert_close(term(x, y), expected, rtol=1e-4, atol=1e-6)
    term(x, y).backward()
    assert x.grad is None
    assert y.grad.count_nonzero() == y.numel()


def test_logits_need_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "num_classes", 0)
    with pytest.raises(UserError, match=r"dino has no classifier.* such as convnext_small"):
        LogitsConfig(network="dino").build(Small())


@pytest.mark.parametrize(("side", "margins"), [(4, (0.0, 0.0)), (4, (0.5, 0.25)), (3, (0.1, 0.1))])
def test_vf_is_the_paper_s_two_hinges(side: int, margins: tuple[float, float]) -> None:
    term = VFConfig(size=32, cosine_margin=margins[0], distance_margin=margins[1]).build(Small())
    torch.manual_seed(1)
    x, z = images(0), torch.randn(2, term.width, side, side)
    features = term.network.features(x)
    assert features.shape == (2, 8, 4, 4)
    features = F.interpolate(features, (side, side), mode="bilinear", antialias=True)
    near, apart = [], []
    for image in range(2):
        ours, theirs = (list(grid[image].flatten(1).unbind(1)) for grid in (z, features))
        for p in range(side**2):
            near.append((1 - margins[0] - cosine(ours[p], theirs[p])).clamp(min=0))
            for q in range(side**2):
                difference = cosine(ours[p], ours[q]) - cosine(theirs[p], theirs[q])
                apart.append((difference.abs() - margins[1]).clamp(min=0))
    expected = torch.stack(near).mean() + torch.stack(apart).mean()
    torch.testing.assert_close(term(x, z), expected, rtol=1e-4, atol=1e-6)
    if margins == (0.0, 0.0):
        assert float(term(x, 3 * features)) == pytest.approx(0, abs=1e-5)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def test_the_semantic_term_is_the_mean_distance_of_directions() -> None:
    term = SemanticConfig(size=32).build(Small())
    torch.manual_seed(1)
    x, inside = images(0), torch.randn(2, 8, 4, 4)
    features = term.network.features(x)
    each = [
        1 - cosine(inside[image, :, i, j], features[image, :, i, j])
        for image in range(2)
        for i in range(4)
        for j in range(4)
    ]
    torch.testing.assert_close(term(x, inside), torch.stack(each).mean())


def test_a_term_of_latents_is_called_with_their_projection() -> None:
    vf = VFConfig(2.0, size=32)
    loss = ReconstructionLoss({"l1": L1Config(), "vf": vf}, Small())
    assert loss.projections == {"vf": ("latents", 8)}
    z = torch.randn(2, 8, 4, 4)
    total, values = loss(images(0), images(1), {"vf": z})
    torch.testing.assert_close(values["vf"], vf.build(Small())(images(0), z))
    torch.testing.assert_close(total, values["l1"] + 2 * values["vf"])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (VFConfig(), r"key\.path: give the file with the weights of vit_small_patch14_dinov2\."),
        (LogitsConfig(path="x"), r"key\.sha256: give the SHA-256 that x should have"),
        (VFConfig(cosine_margin=3, path="x"), r"key\.cosine_margin=3: use a number from 0 to 2"),
        (GramConfig(norm="l3"), r"key\.norm=l3: use l1 or l2"),
    ],
)
def test_settings_that_cannot_be_are_the_users_mistake(config: TermConfig, line: str) -> None:
    with pytest.raises(UserError, match=line):
        config.check("key")


def refuse(*_: Any) -> None:
    raise AssertionError("LPIPS was computed")


def test_a_term_may_be_there_twice_with_other_settings() -> None:
    terms: dict[str, TermConfig] = {"l1": L1Config(), "l1_more": L1Config(2.0)}
    total, values = ReconstructionLoss(terms, Small())(images(0), images(1))
    torch.testing.assert_close(total, 3 * values["l1"])


def test_every_term_has_its_yaml() -> None:
    assert {path.stem for path in (CONF / "loss/terms").glob("*.yaml")} == set(TERMS)
