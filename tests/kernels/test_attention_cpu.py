"""Attention by large products on the CPU: what SDPA gives, within the rounding of the dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from taming_dist.kernels import attention_cpu
from taming_dist.models.prior.blocks.attention import attend


def inputs(positions: int, dtype: torch.dtype = torch.float32, heads: int = 3) -> list[Tensor]:
    """Queries, keys and values as a block cuts them out of one product."""
    torch.manual_seed(0)
    joined = torch.randn(2, positions, 3 * heads * 16).to(dtype)
    parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in joined.chunk(3, 2))
    return [part.detach().requires_grad_(True) for part in parts]


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [7, 128, 129, 300])
def test_values_and_gradients_are_those_of_the_formula(
    positions: int, causal: bool, dtype: torch.dtype, rounding: float
) -> None:
    given = inputs(positions, dtype)
    exact = [leaf.detach().double().requires_grad_(True) for leaf in given]
    y = attention_cpu.attention(given[0], given[1], given[2], causal)
    expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=causal)
    assert y.dtype == dtype
    assert error(y, expected) < rounding
    dy = torch.randn(expected.shape).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    found = torch.autograd.grad(y, given, dy)
    for one, other in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert (one.dtype, one.shape) == (dtype, other.shape)
        assert error(one, other) < rounding


def test_probabilities_are_kept_only_for_a_gradient() -> None:
    query, key, value = inputs(512)

    def most() -> float:
        """The most memory that is held at once, in the scores of the last block."""
        with torch.profiler.profile(profile_memory=True) as profile:
            y = attention_cpu.attention(query, key, value, causal=True)
        assert y.shape == query.shape
        held, peak = 0, 0
        for event in profile.events():
            held += event.self_cpu_memory_usage
            peak = max(peak, held)
        return peak / (4 * query.shape[:2].numel() * attention_cpu.QUERIES * 512)

    with torch.no_grad():
        without = most()
    assert without < 1 < most()


def test_autocast_around_it_changes_nothing() -> None:
    given = inputs(64)
    plain = attention_cpu.attention(given[0], given[1], given[2], True)
    with torch.autocast("cpu", torch.bfloat16):
        around = attention_cpu.attention(given[0], given[1], given[2], True)
        gradients = torch.autograd.grad(around.sum(), given)
    assert torch.equal(plain, around)
    assert all(map(torch.equal, gradients, torch.autograd.grad(plain.sum(), given)))


def test_blocks_take_it_where_onednn_multiplies_and_no_dropout_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        calls.append(causal)
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    monkeypatch.setattr(attention_cpu, "attention", counted)
    monkeypatch.setattr(attention_cpu, "mkl_is_slow", lambda: True)
    query, key, value = inputs(64)
    attend(query, key, value, causal=True)
    attend(query, key, value, causal=False)
    attend(query, key, value, causal=True, unmasked=40)  # and those that see each other
    assert calls == [True, False, True, False]
    attend(query, key, value, causal=True, dropout=0.1)
    attend(query, key, value, causal=True, fast=False)
    attend(query[:, :, :40], key, value, causal=True)
    attend(query, key, value, causal=True, mask=torch.ones(64, 64, dtype=torch.bool))
    small, large = inputs(15), inputs(513, heads=1)
    attend(small[0], small[1], small[2], causal=True)
    attend(large[0], large[1], large[2], causal=True)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(part) for part in (query, key, value)]
        attend(fake[0], fake[1], fake[2], causal=True)
    monkeypatch.setattr(attention_cpu, "mkl_is_slow", lambda: False)
    attend(query, key, value, causal=True)
    assert len(calls) == 4


def test_mkl_multiplies_few_queries_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def asked(*given: Tensor, **how: object) -> Tensor:
        told.append(torch.get_float32_matmul_precision())
        return given[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", asked)
    monkeypatch.setattr(attention_cpu, "mkl_is_slow", lambda: True)
    query, key, value = inputs(64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        attend(query[:, :, -1:], key, value, causal=True)
        attend(query[:, :, -3:], key, value, causal=True)
        attend(query[:, :, -40:], key, value, causal=True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert told == ["highest", "highest", "medium"]
