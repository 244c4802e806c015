"""Lookup-free quantisation against the whole codebook written out."""

import pytest
import torch
from torch import Tensor

from taming_dist.models.quantizers import LFQuantizer, LFQuantizerConfig
from taming_dist.models.quantizers.lookup_free import joint


def latents(d: int) -> Tensor:
    return torch.randn(2, d, 4, 4, generator=torch.Generator().manual_seed(1))


def corners(bits: int) -> Tensor:
    """All entries [2^d,d], in the order of their codes."""
    return torch.tensor([[2.0 * (k >> d & 1) - 1 for d in range(bits)] for k in range(2**bits)])


@pytest.mark.parametrize("bits", [1, 4, 5])
def test_the_code_is_that_of_the_nearest_corner(bits: int) -> None:
    quantizer, z = LFQuantizer(LFQuantizerConfig(bits=bits)), latents(bits)
    out = quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, bits)
    assert torch.equal(out.codes.flatten(), torch.cdist(flat, corners(bits)).argmin(1))
    everything = torch.arange(2**bits)[None, None]
    torch.testing.assert_close(quantizer.lookup(everything)[0, :, 0].T, corners(bits))


@pytest.mark.parametrize("bits", [1, 4, 5])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_loss_and_gradient_equal_the_whole_codebook_written_out(
    bits: int, temperature: float
) -> None:
    config = LFQuantizerConfig(
        bits=bits, beta=0.3, entropy_weight=0.7, diversity=1.4, temperature=temperature
    )
    z = latents(bits).requires_grad_(True)
    out = LFQuantizer(config)(z)
    out.loss.backward()

    twin = latents(bits).double().requires_grad_(True)
    flat, entries = twin.permute(0, 2, 3, 1).reshape(-1, bits), corners(bits).double()
    log_q = (2 * flat @ entries.T / temperature).log_softmax(1)
    mean = log_q.exp().mean(0)
    of_each = -(log_q.exp() * log_q).sum(1).mean()
    of_all = -torch.special.xlogy(mean, mean).sum()
    commitment = (flat - flat.sign()).square().mean()
    expected = 0.3 * commitment + 0.7 * (of_each - 1.4 * of_all)
    expected.backward()
    torch.testing.assert_close(out.loss, expected.detach().float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(z.grad, twin.grad.float(), atol=1e-5, rtol=1e-3)


def test_the_joint_of_independent_bits_sums_to_one_in_the_order_of_the_codes() -> None:
    on = torch.tensor([[0.9, 0.2, 0.5]])
    expected = [
        (0.9 if k & 1 else 0.1) * (0.2 if k & 2 else 0.8) * (0.5 if k & 4 else 0.5)
        for k in range(8)
    ]
    torch.testing.assert_close(joint(on)[0], torch.tensor(expected))


def test_many_bits_never_need_the_matrix_of_vectors_and_codes() -> None:
    """2^20 codes for 4,096 vectors would be 16 GiB."""
    quantizer = LFQuantizer(LFQuantizerConfig(bits=20))
    z = torch.randn(4, 20, 32, 32).requires_grad_(True)
    quantizer(z).loss.backward()
    assert torch.isfinite(z.grad).all()


def test_the_entropy_of_the_batch_is_that_of_all_ranks() -> None:
    quantizer = LFQuantizer(LFQuantizerConfig(bits=4, temperature=0.5))
    halves = latents(4).split(1)
    means: list[Tensor] = []
    quantizer.average = lambda mean: means.append(mean) or mean
    for half in halves:
        quantizer(half)
    together = torch.stack(means).mean(0)
    quantizer.average = lambda mean: together
    split = torch.stack([quantizer(half).loss for half in halves]).mean()
    quantizer.average = None
    torch.testing.assert_close(split, quantizer(latents(4)).loss)
