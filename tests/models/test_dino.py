"""DINO's features and the heads on them, against slow obvious versions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.discriminators import DinoConfig, DinoHeads, track_statistics
from taming_dist.models.discriminators.dino import (
    WIDTH,
    Attention,
    DinoFeatures,
    SpectralConv,
)


@pytest.fixture(scope="module")
def features() -> DinoFeatures:
    torch.manual_seed(0)
    network = DinoFeatures([2, 5], side=32)
    torch.nn.init.normal_(network.cls_token)
    return network


def test_the_network_has_the_names_and_numbers_of_the_public_checkpoint() -> None:
    """21,665,664 parameters, of which the last norm (768) is not needed."""
    with torch.device("meta"):
        state = DinoFeatures([11]).state_dict()
    assert sum(value.numel() for value in state.values()) == 21_665_664 - 768
    assert state["pos_embed"].shape == (1, 197, 384)
    assert state["blocks.11.attn.qkv.weight"].shape == (1152, 384)
    rest = {name for name in state if not name.startswith("blocks.")}
    stem = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert rest == {"cls_token", "pos_embed"} | stem
    of_a_block = {name.removeprefix("blocks.0.") for name in state if name.startswith("blocks.0.")}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert of_a_block == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_features_are_patches_plus_class_token_after_the_given_blocks(
    features: DinoFeatures,
) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    tokens = features.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
    x = torch.cat([features.cls_token.expand(2, 1, WIDTH), tokens], 1) + features.pos_embed
    expected = []
    for index in range(6):
        x = features.blocks[index](x)
        if index in (2, 5):
            expected.append(x[:, 1:] + x[:, 0][:, None])
    found = features(images)
    assert found.shape == (2, 2, 4, WIDTH)
    torch.testing.assert_close(found, torch.stack(expected, 1))


def test_attention_equals_its_formula() -> None:
    torch.manual_seed(0)
    layer, x = Attention(), torch.randn(1, 5, WIDTH)
    q, k, v = layer.qkv(x)[0].chunk(3, 1)
    heads = []
    for head in range(6):
        part = slice(64 * head, 64 * head + 64)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(64)).softmax(1)
        heads.append(weights @ v[:, part])
    expected = layer.proj(torch.cat(heads, 1))
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 3, 16, 16), (1, 1, 32, 32)])
def test_images_of_any_size_and_grey_ones_are_read_and_get_a_gradient(
    features: DinoFeatures, shape: tuple[int, ...]
) -> None:
    images = torch.rand(shape, requires_grad=True)
    features(images).square().sum().backward()
    assert images.grad.count_nonzero() == images.numel()
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())


@pytest.mark.parametrize(("shape", "mode"), [((48, 65), "area"), ((16, 40), "bicubic")])
def test_images_are_resized_as_torch_resizes_them(
    features: DinoFeatures, shape: tuple[int, int], mode: str
) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, *shape)
    expected = F.interpolate(images, (32, 32), mode=mode)
    torch.testing.assert_close(features._resized(images), expected, atol=1e-6, rtol=1e-5)


def heads() -> DinoHeads:
    torch.manual_seed(0)
    return DinoHeads(DinoConfig(weights="random", depths=[2, 5], norm="none"), 3)


def test_every_depth_gives_every_patch_a_logit() -> None:
    network, x = heads(), torch.randn(3, 2, 9, WIDTH)
    track_statistics(network, False)
    found = network(x)
    assert found.shape == (3, 1, 9, 2)
    one = network.heads[1](x[:, 1].transpose(1, 2)[..., None])
    torch.testing.assert_close(found[..., 1:], one)


def test_a_patch_is_judged_with_its_neighbours_in_a_circle() -> None:
    network, x = heads(), torch.randn(1, 2, 16, WIDTH, requires_grad=True)
    network(x)[0, 0, 0, 0].backward()
    seen = x.grad[0, 0].abs().sum(1).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 3, 4, 12, 13, 14, 15]


def test_the_spectral_norm_goes_to_one_in_ds_own_passes_only() -> None:
    torch.manual_seed(0)
    layer, x = SpectralConv(4, 6, 3), torch.randn(1, 4, 9, 1)
    track_statistics(layer, False)
    start = layer.u.clone()
    layer(x)
    assert torch.equal(layer.u, start)
    track_statistics(layer, True)
    layer.eval()(x)
    assert torch.equal(layer.u, start)
    layer.train()
    for _ in range(50):
        layer(x)
    largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
    torch.testing.assert_close(layer._largest(), largest)


def test_two_passes_before_one_backward_give_the_gradient_of_the_normalised_weight() -> None:
    """As D's step does: x, then x^, then backward."""
    torch.manual_seed(0)
    layer, a, b = SpectralConv(3, 5, 3), torch.randn(2, 3, 9, 1), torch.randn(2, 3, 9, 1)
    for _ in range(60):
        layer(a)
    (layer(a).square().sum() + layer(b).square().sum()).backward()
    weight = layer.weight.detach().requires_grad_(True)
    scaled = weight / torch.linalg.matrix_norm(weight.flatten(1), ord=2)

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 0, 1, 1), mode="circular"), scaled, layer.bias.detach())

    (convolve(a).square().sum() + convolve(b).square().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"depths": [2, 12]},
            r"loss\.discriminator\.depths=\[2, 12\]: use one or more whole numbers from 0 to 11",
        ),
        ({"depths": []}, r"loss\.discriminator\.depths=\[\]"),
        ({"norm": "actnorm"}, r"loss\.discriminator\.norm=actnorm: use batch, group or none"),
    ],
)
def test_heads_that_cannot_be_are_the_users_mistake(settings: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        DinoConfig(**settings)
