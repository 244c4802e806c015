"""A VQGAN on the CPU: the shorter way gives the codes, images and gradients of the plain one."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from taming_dist.kernels import winograd
from taming_dist.models.convolution import Convolution
from taming_dist.models.modalities import RGB
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.quick import run_plainly
from taming_dist.models.vqgan import VQGAN, VQGANConfig


def config() -> VQGANConfig:
    return VQGANConfig(
        VectorQuantizerConfig(codes=64, dim=8), 32, channels=128, multipliers=[1, 2], blocks=1,
        attention_resolutions=[16], latent_channels=128, modality=RGB(),
    )  # fmt: skip


@pytest.fixture
def taken() -> Iterator[Any]:
    """The shorter way, watched."""
    with mock.patch.object(winograd, "convolution", wraps=winograd.convolution) as watched:
        yield watched


def images() -> Tensor:
    """Smooth ones of 64 pixels, as photographs are, in a batch of 2."""
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").tanh()


def test_codes_are_the_same_and_images_and_gradients_within_rounding(taken: Any) -> None:
    torch.manual_seed(0)
    network, x = VQGAN(config()), images()
    results = []
    for plain in (False, True):
        if plain:
            run_plainly(network)
        out = network(x)
        (out.images.square().mean() + out.codebook_loss).backward()
        results.append(
            (network.encode(x), out.images.detach(), [p.grad for p in gradients(network)])
        )
        if not plain:
            assert taken.call_count == 2 * 9 + 14  # the encoder twice, the decoder once
            assert sum(call.args[3] for call in taken.call_args_list) == 1  # the upsampling
        network.zero_grad()
    (codes, made, found), (plain_codes, plain_made, expected) = results
    assert torch.equal(codes, plain_codes)
    assert codes.unique().numel() > 4
    torch.testing.assert_close(made, plain_made, atol=2e-5, rtol=0)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-4 * other.norm() + 1e-7


def gradients(network: VQGAN) -> list[Any]:
    """The parameters of the convolutions of the shorter way: weights."""
    return [m.weight for m in network.modules() if isinstance(m, Convolution)]
