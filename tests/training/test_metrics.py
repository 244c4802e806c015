"""Averages and codebook usage against slow versions."""

import math
import random

import pytest
import torch

from taming_dist.engine.world import World
from taming_dist.training.metrics import CodeUsage, Means

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_means_are_those_of_every_value_given_since_the_last_time() -> None:
    means, numbers = Means(), random.Random(0)
    for _ in range(2):
        given: dict[str, list[float]] = {"a": [], "b": []}
        for step in range(7):
            values = {"a": numbers.random()}
            if step > 3:  # a name may be there in some steps only
                values["b"] = numbers.random()
            for name, value in values.items():
                given[name].append(value)
            means.add({name: torch.tensor(value) for name, value in values.items()})
        expected = {name: sum(values) / len(values) for name, values in given.items()}
        assert means.take(ALONE) == pytest.approx(expected)
    assert means.take(ALONE) == {}


def test_means_are_taken_in_fp32_and_hold_no_graph() -> None:
    means = Means()
    weight = torch.ones(1, requires_grad=True)
    for _ in range(300):
        means.add({"loss": (weight * 1.0).sum().bfloat16()})
    assert not means._sums["loss"].requires_grad
    assert means.take(ALONE) == {"loss": 1.0}


def test_one_bad_value_shows_in_the_mean() -> None:
    means = Means()
    for value in (1.0, float("nan"), 2.0):
        means.add({"loss": torch.tensor(value)})
    assert math.isnan(means.take(ALONE)["loss"])


def test_usage_and_perplexity_equal_slow_versions() -> None:
    numbers = random.Random(1)
    codes = [numbers.choice([0, 0, 0, 3, 5, 8]) for _ in range(400)]
    usage = CodeUsage(10, torch.device("cpu"))
    for part in (codes[:100], codes[100:]):
        usage.add(torch.bincount(torch.tensor(part), minlength=10).float())
    found = usage.take()
    shares = [codes.count(code) / 400 for code in set(codes)]
    assert found["codebook_usage"] == pytest.approx(len(shares) / 10)
    entropy = -sum(share * math.log(share) for share in shares)
    assert found["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert usage.take() == {}


def test_all_codes_alike_give_a_perplexity_of_their_number() -> None:
    usage = CodeUsage(16, torch.device("cpu"))
    usage.add(torch.full((16,), 3.0))
    assert usage.take() == pytest.approx({"codebook_usage": 1.0, "codebook_perplexity": 16.0})
