"""The Gumbel quantizer: the original's numbers, its distribution, its temperature."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from taming_dist.models.quantizers import GumbelQuantizer, GumbelQuantizerConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "vqgan_quantizers.pt"


def made(**settings: float) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(GumbelQuantizerConfig(codes=7, dim=4, **settings))  # type: ignore[arg-type]


def latents() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def test_it_equals_the_original_with_both_gradients() -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    expected = golden["gumbel"]
    quantizer = GumbelQuantizer(
        GumbelQuantizerConfig(codes=32, dim=8, kl_weight=5e-4, temperature=1.0)
    )
    quantizer.proj = nn.Conv2d(16, 32, 1)  # the recording's latents are wider than its entries
    quantizer.load_state_dict(expected["state"])
    z = golden["z"].clone().requires_grad_(True)
    torch.manual_seed(5)
    out = quantizer(z)
    (out.loss + 0.1 * out.z_q.sum()).backward()
    assert torch.equal(out.codes, expected["indices"])
    torch.testing.assert_close(out.z_q, expected["zq"])
    torch.testing.assert_close(out.loss, expected["loss"])
    torch.testing.assert_close(z.grad, expected["grad_z"])
    torch.testing.assert_close(quantizer.embed.weight.grad, expected["grad_codebook"])


def test_codes_are_drawn_with_the_probabilities_of_the_logits() -> None:
    quantizer = made()
    z = latents()[:1, :, :1, :1].expand(1, 4, 100, 100)
    found = quantizer(z).statistics.counts / 10_000
    expected = quantizer.proj(z[:, :, :1, :1]).softmax(1).flatten()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)


def test_evaluation_takes_the_most_probable_code_without_noise() -> None:
    quantizer = made().eval()
    out = quantizer(latents())
    assert torch.equal(out.codes, quantizer.proj(latents()).argmax(1))


def test_the_loss_is_the_divergence_from_the_uniform_distribution() -> None:
    quantizer = made(kl_weight=2.0)
    q = quantizer.proj(latents()).softmax(1).detach()
    slow = [
        sum(float(q[b, k, i, j]) * math.log(7 * float(q[b, k, i, j])) for k in range(7))
        for b in range(2)
        for i in range(5)
        for j in range(5)
    ]
    assert quantizer(latents()).loss.item() == pytest.approx(2 * sum(slow) / 50, rel=1e-4)


def test_the_gradient_is_that_of_the_relaxed_sample() -> None:
    quantizer = made(temperature=0.7)
    z = latents().requires_grad_(True)
    torch.manual_seed(3)
    out = quantizer(z)
    weights = torch.randn(out.z_q.shape)
    (out.z_q * weights).sum().backward()
    twin = latents().requires_grad_(True)
    torch.manual_seed(3)
    logits = quantizer.proj(twin)
    noise = -torch.empty_like(logits).exponential_().log()
    relaxed = ((logits + noise) / 0.7).softmax(1)
    mixed = (relaxed[:, :, None] * quantizer.embed.weight.detach()[None, :, :, None, None]).sum(1)
    (mixed * weights).sum().backward()
    torch.testing.assert_close(z.grad, twin.grad, atol=1e-5, rtol=1e-4)


def test_the_temperature_is_a_function_of_progress_alone() -> None:
    quantizer = made(temperature=0.9, final_temperature=0.1)
    assert quantizer.anneal(0.0) == {"temperature": pytest.approx(0.9)}
    assert quantizer.anneal(1.0) == {"temperature": pytest.approx(0.1)}
    assert quantizer.anneal(0.5) == {"temperature": pytest.approx(0.5)}
    assert (
        quantizer.anneal(0.25)["temperature"]
        == quantizer.temperature
        == pytest.approx(0.1 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    )
