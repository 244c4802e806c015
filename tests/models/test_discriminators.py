"""Discriminators against the original's outputs, torch's own BatchNorm, and slow size rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.discriminators import (
    BatchNorm,
    BlurPoolConfig,
    BlurPoolGAN,
    PatchGAN,
    PatchGANConfig,
    StyleGAN,
    StyleGANConfig,
    accuracy,
    average_statistics,
    initialize_actnorm,
    track_statistics,
)
from taming_dist.models.discriminators.stylegan import Conv, MinibatchDeviation, blur

GOLDEN = Path(__file__).parents[1] / "golden" / "vqgan_discriminators.pt"


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
def test_outputs_and_statistics_equal_the_original(norm: str) -> None:
    """The recording drew weights, then images, from seed 2 in this very order."""
    golden = torch.load(GOLDEN, weights_only=True)[norm]
    torch.manual_seed(2)
    network = PatchGAN(PatchGANConfig(channels=16, layers=2, norm=norm), image_channels=3)
    images = torch.randn(2, 3, 64, 64)
    initialize_actnorm(network, images)
    logits = network(images)
    assert logits.shape == (2, 1, 14, 14)
    torch.testing.assert_close(logits[:, :, ::3, ::3], golden["train"], atol=1e-5, rtol=1e-4)
    state = network.state_dict()
    for name, value in golden["state"].items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)
    evaluated = network.eval()(images)[:, :, ::3, ::3]
    torch.testing.assert_close(evaluated, golden["eval"], atol=1e-5, rtol=1e-4)


def trained_pair() -> tuple[BatchNorm, nn.BatchNorm2d, Tensor]:
    torch.manual_seed(0)
    mine, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    nn.init.normal_(mine.weight)
    nn.init.normal_(mine.bias)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs, torch.randn(4, 3, 6, 6) * 3 + 1


def test_batch_norm_equals_torchs_forward_backward_and_running_statistics() -> None:
    mine, theirs, x = trained_pair()
    weights = torch.randn_like(x)
    gradients = []
    for layer in (mine, theirs):
        leaf = x.clone().requires_grad_(True)
        (layer(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, atol=1e-4, rtol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


class HalvesOfABatch:
    """Stands for the mean over two ranks, one of which saw `other`."""

    ranks = 2

    def __init__(self, other: Tensor) -> None:
        self.other = torch.stack([other.mean((0, 2, 3)), other.square().mean((0, 2, 3))])

    def __call__(self, moments: Tensor) -> Tensor:
        return (moments + self.other) / 2


def test_averaged_statistics_normalise_half_a_batch_as_the_whole_batch_would() -> None:
    mine, theirs, x = trained_pair()
    network = nn.Sequential(mine)
    average_statistics(network, HalvesOfABatch(x[2:]))
    torch.testing.assert_close(network(x[:2]), theirs(x)[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.running_var, theirs.running_var)


def test_untracked_passes_normalise_by_the_batch_and_leave_running_statistics_alone() -> None:
    mine, theirs, x = trained_pair()
    network = nn.Sequential(mine)
    track_statistics(network, False)
    torch.testing.assert_close(network(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert mine.num_batches_tracked == 0
    assert torch.equal(mine.running_mean, torch.zeros(3))
    track_statistics(network, True)
    network(x)
    assert mine.num_batches_tracked == 1


def test_batch_norm_computes_in_fp32_under_autocast() -> None:
    mine, _, x = trained_pair()
    expected = mine(x + 300)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mine(x + 300), expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_size_is_the_smallest_that_gives_a_logit(layers: int) -> None:
    config = PatchGANConfig(channels=2, layers=layers, norm="none")
    network = PatchGAN(config, image_channels=3)
    size = config.smallest_size()
    assert network(torch.zeros(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, size - 1, size - 1))


def test_actnorm_set_on_halves_of_a_batch_equals_the_whole_batch() -> None:
    """The other half stands for the other rank."""
    torch.manual_seed(0)
    config = PatchGANConfig(channels=4, layers=1, norm="actnorm")
    whole, half = PatchGAN(config, 3), PatchGAN(config, 3)
    half.load_state_dict(whole.state_dict())
    x = torch.randn(4, 3, 16, 16)
    inner = whole.main[2](whole.main[1](whole.main[0](x)))[2:]

    class Mean:
        ranks = 2

        def __init__(self) -> None:
            mean = inner.mean((0, 2, 3), keepdim=True)
            self.others = iter([mean, None])

        def __call__(self, mine: Tensor) -> Tensor:
            other = next(self.others)
            if other is None:
                other = (inner - self.mean).square().mean((0, 2, 3), keepdim=True)
            self.mean = (mine + other) / 2
            return self.mean

    average_statistics(half, Mean())
    assert initialize_actnorm(whole, x)
    assert initialize_actnorm(half, x[:2])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert not initialize_actnorm(whole, x)


# BlurPoolGAN


def test_blurring_before_halving_is_the_sum_that_it_is_on_paper() -> None:
    network = BlurPoolGAN(BlurPoolConfig(channels=8, layers=1), 3)
    x = torch.randn(1, 2, 6, 4)
    padded, weights = F.pad(x, (1, 1, 1, 1)), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    expected = torch.zeros(1, 2, 3, 2)
    for i in range(3):
        for j in range(2):
            window = padded[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
            expected[:, :, i, j] = (window * weights[:, None] * weights).sum((2, 3))
    torch.testing.assert_close(network.main[3](x), expected)


@pytest.mark.parametrize(("size", "logits"), [(32, 8), (64, 16), (128, 16), (160, 20)])
def test_of_a_large_map_the_strongest_answers_are_judged(size: int, logits: int) -> None:
    network = BlurPoolGAN(BlurPoolConfig(channels=8, layers=2), 3)
    images = torch.randn(1, 3, size, size)
    assert network(images).shape == (1, 1, logits, logits)
    if size == 128:
        pooled = F.adaptive_max_pool2d(network.main(images), 16)
        torch.testing.assert_close(network(images), network.to_logits(pooled))


def test_its_size_is_the_published_one() -> None:
    with torch.device("meta"):
        network = BlurPoolGAN(BlurPoolConfig(), 3)
    convolutions = [(3, 128, 5), (128, 128, 3), (128, 256, 3), (256, 512, 3), (512, 512, 1)]
    convolutions.append((512, 1, 5))
    expected = sum(i * o * k * k + o for i, o, k in convolutions) + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in network.parameters()) == expected
    with pytest.raises(UserError, match=r"data\.size=100: .*layers=3 halves .* a multiple of 8"):
        BlurPoolConfig().check_size(100)


# StyleGAN


def stylegan(**settings: Any) -> StyleGAN:
    torch.manual_seed(0)
    return StyleGAN(StyleGANConfig(**{"size": 32, "channels": 8, "max_channels": 16} | settings), 3)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_stylegan_gives_one_logit_for_an_image(size: int) -> None:
    assert stylegan(size=size)(torch.randn(2, 3, size, size)).shape == (2, 1, 1, 1)


def test_stylegan_has_the_parameters_of_the_paper() -> None:
    """Channels 64 to 512 at 256 px; counted by hand from table and figure 7c."""
    with torch.device("meta"):
        network = StyleGAN(StyleGANConfig(), 3)
    widths = [64, 128, 256, 512, 512, 512, 512]
    expected = (3 + 1) * 64
    for a, b in zip(widths, widths[1:], strict=False):
        expected += (9 * a + 1) * a + (9 * a + 1) * b + a * b
    expected += (9 * 513 + 1) * 512 + (512 * 16 + 1) * 512 + 512 + 1
    assert sum(p.numel() for p in network.parameters()) == expected


def test_the_equalised_network_computes_what_the_plain_one_does_with_scaled_weights() -> None:
    """Same function at the same draws; only the optimizer sees other weights."""
    equalized, plain = stylegan(), stylegan(equalized=False)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(equalized(x), plain(x), atol=1e-5, rtol=1e-4)
    assert equalized.last.weight.std().item() == pytest.approx(1, rel=0.05)
    assert plain.last.weight.std().item() == pytest.approx((17 * 9) ** -0.5, rel=0.05)


def test_blurring_keeps_the_mean_of_a_constant_and_removes_the_finest_stripes() -> None:
    constant = torch.full((1, 2, 6, 6), 3.0)
    torch.testing.assert_close(blur(constant), constant)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert blur(stripes)[..., 1:-1].abs().max() < 1e-6


def test_the_minibatch_deviation_tells_batches_of_copies_from_others() -> None:
    layer = MinibatchDeviation()
    copies = torch.randn(1, 2, 4, 4).expand(3, -1, -1, -1)
    assert layer(copies)[:, 2].abs().max() < 1e-3
    x = torch.randn(3, 2, 4, 4)
    found = layer(x)
    assert torch.equal(found[:, :2], x)
    expected = x.std(0, unbiased=False).mean()
    torch.testing.assert_close(found[:, 2], expected.expand(3, 4, 4))


def test_every_stylegan_logit_has_a_second_derivative() -> None:
    """R1 needs it."""
    network = stylegan()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert all(
        p.grad.isfinite().all() for name, p in network.named_parameters() if "weight" in name
    )


def test_accuracy_counts_patches_on_the_right_side() -> None:
    real, fake = torch.tensor([[1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]]).view(2, 1, 1, 2, 2)
    assert accuracy(real, fake).item() == pytest.approx((0.75 + 0.25) / 2)


def test_an_unknown_norm_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"loss\.discriminator\.norm=layer: use one of"):
        PatchGANConfig(norm="layer")


def test_halving_by_1x1_weights_is_that_of_the_blurred_image() -> None:
    """Only the pixels that are kept are blurred (and oneDNN's way of a strided 1x1 convolution is
    avoided, which on one CPU thread writes beyond its memory in the backward pass)."""
    torch.manual_seed(0)
    skip, x = Conv(8, 16, 1, equalized=True, down=True, biased=False), torch.randn(2, 8, 32, 32)
    expected = F.conv2d(blur(x), skip.weight * skip.scale, stride=2)
    assert torch.equal(skip(x), expected)
