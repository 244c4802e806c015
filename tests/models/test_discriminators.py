"""Discriminators against the original's outputs, torch's own BatchNorm, and slow size rules."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.discriminators import (
    BatchNorm,
    PatchGAN,
    PatchGANConfig,
    accuracy,
    average_statistics,
    track_statistics,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "vqgan_discriminators.pt"


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
def test_outputs_and_statistics_equal_the_original(norm: str) -> None:
    """The recording drew weights, then images, from seed 2 in this very order."""
    golden = torch.load(GOLDEN, weights_only=True)[norm]
    torch.manual_seed(2)
    network = PatchGAN(PatchGANConfig(channels=16, layers=2, norm=norm), image_channels=3)
    images = torch.randn(2, 3, 64, 64)
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


def test_accuracy_counts_patches_on_the_right_side() -> None:
    real, fake = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([-1.0, 1.0, 1.0, 1.0])
    assert accuracy(real, fake).item() == pytest.approx((0.75 + 0.25) / 2)


def test_an_unknown_norm_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"loss\.discriminator\.norm=layer: use one of"):
        PatchGANConfig(norm="layer")
