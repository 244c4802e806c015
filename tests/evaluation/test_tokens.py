"""Figures of a token model against their definitions."""

import math

import pytest
import torch

from taming_dist.evaluation.tokens import TokenMetrics


def test_figures_weigh_every_token_the_same_whatever_the_batches() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(5, 3, 7), torch.randint(0, 7, (5, 3))
    figures = TokenMetrics(7)
    figures.update(logits[:4], codes[:4])
    figures.update(logits[4:], codes[4:])
    probabilities = logits.softmax(-1).gather(-1, codes[..., None])
    frequencies = codes.flatten().bincount(minlength=7).double() / codes.numel()
    assert figures.compute() == pytest.approx(
        {
            "val_nll": float(-probabilities.log().mean()),
            "unigram_entropy": float(torch.special.entr(frequencies).sum()),
        },
        rel=1e-5,
    )


def test_a_model_that_knows_only_the_frequencies_reaches_the_unigram_entropy() -> None:
    codes = torch.tensor([[0, 0, 0, 1]])
    logits = torch.tensor([3 / 4, 1 / 4]).log().expand(1, 4, 2)
    figures = TokenMetrics(2)
    figures.update(logits, codes)
    found = figures.compute()
    assert found["val_nll"] == pytest.approx(found["unigram_entropy"])
    assert found["val_nll"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_sums_of_ranks_add_up() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(4, 3, 7), torch.randint(0, 7, (4, 3))
    alone, first, second = (TokenMetrics(7) for _ in range(3))
    alone.update(logits, codes)
    first.update(logits[:1], codes[:1])
    second.update(logits[1:], codes[1:])
    first.sums += second.sums
    assert first.compute() == pytest.approx(alone.compute(), rel=1e-6)
