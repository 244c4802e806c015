"""Binary spherical quantisation against entries, probabilities and entropies written out."""

import pytest
import torch
from torch import Tensor

from taming_dist.models.quantizers import BSQuantizer, BSQuantizerConfig
from tests.models.quantizers.test_lookup_free import corners, latents


def slow(z: Tensor, config: BSQuantizerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, entries and loss by the nearest of all entries, and the distribution of each bit."""
    entries = corners(config.bits).to(z.dtype) / config.bits**0.5
    vectors = z.permute(0, 2, 3, 1).reshape(-1, config.bits)
    on_sphere = vectors / vectors.norm(dim=1, keepdim=True)
    codes = torch.cdist(on_sphere, entries).argmin(1)
    log_q = (2 * on_sphere @ entries.T / config.temperature).log_softmax(1)
    of_each = -(log_q.exp() * log_q).sum(1).mean()
    mean = log_q.exp().mean(0)
    has_bit = entries > 0
    of_all = torch.zeros((), dtype=z.dtype)
    for bit in range(config.bits):
        for p in (mean[has_bit[:, bit]].sum(), mean[~has_bit[:, bit]].sum()):
            of_all = of_all - torch.special.xlogy(p, p)
    commitment = (on_sphere - entries[codes]).square().mean()
    loss = config.entropy_weight * (of_each - config.diversity * of_all)
    return codes, entries[codes], loss + config.beta * commitment


@pytest.mark.parametrize("bits", [1, 4, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_codes_loss_and_gradient_equal_the_slow_form(bits: int, temperature: float) -> None:
    config = BSQuantizerConfig(
        bits=bits, beta=0.3, entropy_weight=0.7, diversity=1.4, temperature=temperature
    )
    z, twin = latents(bits).requires_grad_(True), latents(bits).double().requires_grad_(True)
    out = BSQuantizer(config)(z)
    codes, entries, loss = slow(twin, config)
    assert torch.equal(out.codes.flatten(), codes)
    chosen = out.z_q.permute(0, 2, 3, 1).reshape(-1, bits)
    torch.testing.assert_close(chosen, entries.float())
    torch.testing.assert_close(out.loss, loss.float())
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(z.grad, twin.grad.float(), atol=1e-5, rtol=1e-3)


def test_the_gradient_of_an_entry_reaches_the_latent_through_the_sphere_alone() -> None:
    """As if the entry were the latent on the sphere: nothing along the latent, whose length does
    not matter."""
    quantizer = BSQuantizer(BSQuantizerConfig(bits=4)).eval()
    z, twin = (latents(4).requires_grad_(True) for _ in range(2))
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (quantizer(z).z_q * weight).sum().backward()
    (torch.nn.functional.normalize(twin, dim=1) * weight).sum().backward()
    torch.testing.assert_close(z.grad, twin.grad)
    assert torch.equal(quantizer(9 * z).codes, quantizer(z).codes)
    torch.testing.assert_close((z.grad * z).sum(1), torch.zeros(2, 4, 4), atol=1e-6, rtol=0)


def test_the_entropy_by_factors_is_never_less_than_that_of_all_codes() -> None:
    """They are equal where the bits are independent; here two bits always agree."""
    from taming_dist.models.quantizers.entropy import entropy
    from taming_dist.models.quantizers.lookup_free import joint

    on = torch.tensor([[0.9, 0.9], [0.1, 0.1]])
    quantizer = BSQuantizer(BSQuantizerConfig(bits=2))
    exact = entropy(joint(on).mean(0))
    assert entropy(quantizer._mean(on)) > exact
    alone = torch.tensor([[0.9, 0.3]])
    torch.testing.assert_close(entropy(quantizer._mean(alone)), entropy(joint(alone)[0]))
