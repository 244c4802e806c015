"""The token loss, the input noise and the unigram entropy against closed forms."""

import math

import pytest
import torch

from taming_dist.losses.tokens import corrupt, token_nll, unigram_entropy


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    loss = token_nll(torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.int64))
    assert loss.item() == pytest.approx(math.log(50))


def test_the_loss_is_the_mean_surprise_of_the_targets() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])
    loss = token_nll(probabilities.log(), torch.tensor([[1, 2]]))
    assert loss.item() == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)


def test_the_loss_of_half_precision_logits_is_computed_in_fp32() -> None:
    logits = torch.randn(2, 8, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(16).reshape(2, 8)
    loss = token_nll(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == token_nll(logits.float(), targets).item()


def test_tokens_with_a_chance_below_pkeep_stay_and_others_become_noise() -> None:
    tokens, noise = torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8, 9]])
    chance = torch.tensor([[0.0, 0.5, 0.49]])
    assert corrupt(tokens, 0.5, chance, noise).tolist() == [[1, 8, 3]]
    assert corrupt(tokens, 1.0, chance, noise).tolist() == [[1, 2, 3]]
    assert corrupt(tokens, 0.0, chance, noise).tolist() == [[7, 8, 9]]


def test_the_share_of_kept_tokens_is_pkeep() -> None:
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(100, 200, generator=generator)
    ones, zeros = torch.ones(100, 200, dtype=torch.int64), torch.zeros(100, 200, dtype=torch.int64)
    kept = corrupt(ones, 0.9, chance, zeros)
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_unigram_entropy_of_known_counts() -> None:
    assert unigram_entropy(torch.full((64,), 5)).item() == pytest.approx(math.log(64))
    assert unigram_entropy(torch.tensor([0, 12, 0])).item() == 0
    mixed = unigram_entropy(torch.tensor([1, 3, 0])).item()
    assert mixed == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
