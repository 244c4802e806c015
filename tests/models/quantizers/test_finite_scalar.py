"""Finite scalar quantisation against a slow loop over channels."""

import math

import pytest
import torch
from torch import Tensor

from taming_dist.models.quantizers import FSQuantizer, FSQuantizerConfig

LEVELS = [8, 5, 2, 3]


def latents() -> Tensor:
    return 2 * torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def slow_digit(value: float, levels: int) -> int:
    """The level, 0 to L-1, of one number (section A.1)."""
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    bounded = math.tanh(value + math.atanh(offset / half)) * half - offset
    return round(bounded) + levels // 2


def test_codes_and_entries_equal_a_slow_loop() -> None:
    z, out = latents(), FSQuantizer(FSQuantizerConfig(levels=LEVELS))(latents())
    for b, i, j in [(0, 0, 0), (1, 2, 3), (2, 4, 4), (0, 3, 1)]:
        digits = [slow_digit(float(z[b, d, i, j]), LEVELS[d]) for d in range(4)]
        code, place = 0, 1
        for digit, levels in zip(digits, LEVELS, strict=True):
            code, place = code + digit * place, place * levels
        assert int(out.codes[b, i, j]) == code
        entry = [
            (digit - levels // 2) / (levels // 2)
            for digit, levels in zip(digits, LEVELS, strict=True)
        ]
        torch.testing.assert_close(out.z_q[b, :, i, j], torch.tensor(entry))


def test_every_level_is_reached_and_none_beyond() -> None:
    for levels in (2, 3, 4, 5, 8):
        quantizer = FSQuantizer(FSQuantizerConfig(levels=[levels]))
        z = torch.linspace(-50, 50, 4001).view(1, 1, 1, -1)
        assert quantizer(z).codes.unique().tolist() == list(range(levels))


def test_every_code_is_reached_and_named_after_its_entry() -> None:
    quantizer = FSQuantizer(FSQuantizerConfig(levels=LEVELS))
    wide = 2 * torch.randn(60, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    out = quantizer(wide)
    assert int((out.statistics.counts > 0).sum()) == 8 * 5 * 2 * 3
    assert torch.equal(quantizer.lookup(out.codes), out.z_q)


def test_the_gradient_is_that_of_the_bounded_latent() -> None:
    z = latents()[:, :2].requires_grad_(True)
    FSQuantizer(FSQuantizerConfig(levels=[8, 5]))(z).z_q.sum().backward()
    twin = latents()[:, :2].double().requires_grad_(True)
    eight = torch.tanh(twin[:, 0] + math.atanh(0.5 / (3.5 * 1.001))) * 3.5 * 1.001 / 4
    five = torch.tanh(twin[:, 1]) * 2 * 1.001 / 2
    (eight.sum() + five.sum()).backward()
    torch.testing.assert_close(z.grad, twin.grad.float())


def test_there_is_nothing_to_learn() -> None:
    quantizer = FSQuantizer(FSQuantizerConfig(levels=LEVELS))
    assert quantizer.state_dict() == {}
    assert float(quantizer(latents()).loss) == 0


def test_vocabulary_and_dimension_follow_from_the_levels() -> None:
    config = FSQuantizerConfig(levels=[8, 8, 8, 6, 5])
    assert (config.codes, config.dim) == (15_360, 5)


@pytest.mark.parametrize("levels", [[4, 3, 2], [2, 2]])
def test_lookup_inverts_every_code(levels: list[int]) -> None:
    quantizer = FSQuantizer(FSQuantizerConfig(levels=levels))
    codes = torch.arange(quantizer.vocabulary)[None, None]
    assert len(quantizer.lookup(codes)[0, :, 0].T.unique(dim=0)) == quantizer.vocabulary
