"""Encoder and decoder: shapes, attention against the formula, the gradient of the last layer."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming_dist.models.autoencoder import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Moments,
    Norm,
    ResnetBlock,
    last_layer_gradients,
)

SHAPE = {
    "latent_channels": 6,
    "channels": 32,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_resolutions": [8],
    "resolution": 16,
}


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_the_encoder_halves_and_the_decoder_doubles_any_size(height: int, width: int) -> None:
    latents = Encoder(3, **SHAPE)(torch.zeros(2, 3, height, width))
    assert latents.shape == (2, 6, height // 2, width // 2)
    assert Decoder(3, **SHAPE)(latents).shape == (2, 3, height, width)


def test_attention_stands_at_the_given_resolutions_only() -> None:
    encoder, decoder = Encoder(3, **SHAPE), Decoder(3, **SHAPE)
    assert [len(level.attn) for level in encoder.down] == [0, 1]
    assert [len(level.attn) for level in decoder.up] == [0, 2]


def test_attention_equals_the_formula() -> None:
    torch.manual_seed(0)
    block = AttnBlock(32)
    x = torch.randn(2, 32, 3, 4)
    y = block.norm(x)
    q, k, v = (layer(y).reshape(2, 32, 12) for layer in (block.q, block.k, block.v))
    weights = (torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5).softmax(-1)
    attended = torch.einsum("bnm,bcm->bcn", weights, v).reshape(2, 32, 3, 4)
    torch.testing.assert_close(block(x), x + block.proj_out(attended), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_runs_on_a_fused_kernel(layout: torch.memory_format) -> None:
    """Where a fused kernel cannot serve, this context raises instead of taking the slow path."""
    x = torch.randn(2, 32, 3, 4).to(memory_format=layout).requires_grad_(True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        AttnBlock(32)(x).sum().backward()
    assert x.grad is not None


def test_a_norm_takes_the_moments_of_the_image_that_it_sees_a_part_of() -> None:
    torch.manual_seed(0)
    norm = Norm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    image = torch.randn(1, 64, 6, 5) * 3 + 2
    variance, mean = torch.var_mean(image.double().reshape(32, -1), 1, correction=0)
    part = norm(image[:, :, 2:4], Moments(mean, variance))
    torch.testing.assert_close(part, norm(image)[:, :, 2:4])
    assert not torch.allclose(norm(image[:, :, 2:4]), part, atol=0.1)


def test_the_halves_of_a_residual_block_make_up_the_whole() -> None:
    torch.manual_seed(0)
    block, x = ResnetBlock(32, 64, dropout=0.0), torch.randn(2, 32, 4, 5)
    assert torch.equal(block.second(x, block.first(x)), block(x))


def test_downsampling_pads_right_and_below_only() -> None:
    layer = Downsample(1)
    nn.init.zeros_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    layer.conv.weight.data[0, 0, 0, 0] = 1.0  # gives the upper left pixel of each window
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_the_last_layers_gradients_equal_autograds() -> None:
    torch.manual_seed(0)
    decoder = Decoder(3, **SHAPE)
    z = torch.randn(2, 6, 4, 4)
    features = decoder.features(z)
    images = decoder.conv_out(features)
    target = torch.randn_like(images)
    leaf = images.detach().requires_grad_(True)
    expected, at_image = [], []
    for power in (1, 2):
        last, loss = decoder.conv_out.weight, (images - target).abs().pow(power).mean()
        expected += torch.autograd.grad(loss, last, retain_graph=True)
        at_image += torch.autograd.grad((leaf - target).abs().pow(power).mean(), leaf)
    found = last_layer_gradients(features.detach(), at_image)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-8, rtol=1e-5)
    assert torch.equal(images, decoder(z))


def test_in_bf16_the_last_layers_gradients_are_near_those_of_fp32() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 32, 8, 8)
    at_image = [torch.randn(2, 3, 8, 8) * 1e-6, torch.randn(2, 3, 8, 8)]  # of any size
    exact = last_layer_gradients(features, at_image)
    found = last_layer_gradients(features.bfloat16(), at_image, torch.bfloat16)
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    for ours, expected in zip(found, exact, strict=True):
        assert (ours - expected).norm() < 0.01 * expected.norm()
