"""Averages and codebook usage against slow versions."""

import dataclasses
import math
import random

import pytest
import torch

from taming_dist.engine.world import World
from taming_dist.training.metrics import CodeUsage, Means, read
from taming_dist.training.ranks import MEMORY, WAIT, Memory, beside_each_other

ALONE = World(0, 1, 0, torch.device("cpu"))
MOVED = torch.tensor(True)


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
            scalars = {name: torch.tensor(value) for name, value in values.items()}
            means.add_all([scalars], MOVED)
            means.add_all([{name: torch.tensor(math.nan) for name in values}], ~MOVED)
        expected = {name: sum(values) / len(values) for name, values in given.items()}
        assert read(means.take(ALONE)) == pytest.approx(expected)
    assert means.take(ALONE) == {}


def test_the_mean_of_skipped_steps_alone_is_no_number() -> None:
    means = Means()
    means.add_all([{"loss": torch.tensor(1.0)}], ~MOVED)
    assert math.isnan(read(means.take(ALONE))["loss"])


@dataclasses.dataclass(frozen=True)
class Pair(World):
    """The second of two ranks; `first` is what the other adds in the next collective."""

    first: list[float] = dataclasses.field(default_factory=list)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor(self.first)


def test_what_each_rank_has_for_itself_comes_in_the_collective_of_the_means() -> None:
    means = Means()
    means.add_all([{"loss": torch.tensor(3.0), "rec": torch.tensor(1.0)}], MOVED)
    # means of loss and rec, then the table of wait, memory and loss by rank
    world = Pair(1, 2, 0, torch.device("cpu"), [1.0, 0.0, 0.25, 5.0, 1.0, 0.0, 0.0, 0.0])
    found, ranks = means.take_beside(world, {WAIT: 0.5, MEMORY: 4.0})
    assert read(found) == {"loss": 2.0, "rec": 0.5}
    assert read(beside_each_other(ranks)) == {
        "throughput/memory_peak_gib": 5.0,
        "ranks/data_wait_max": 0.5,
        "ranks/data_wait_longest": 1.0,
        "ranks/loss_max": 3.0,
    }


def test_a_rank_alone_is_beside_no_other() -> None:
    means = Means()
    means.add_all([{"loss": torch.tensor(3.0)}], MOVED)
    _, ranks = means.take_beside(ALONE, {WAIT: 0.5} | Memory(ALONE.device).take())
    (name,) = beside_each_other(ranks)
    assert name == "throughput/memory_peak_gib"


def test_means_are_taken_in_fp32_and_hold_no_graph() -> None:
    means = Means()
    weight = torch.ones(1, requires_grad=True)
    for _ in range(300):
        means.add_all([{"loss": (weight * 1.0).sum().bfloat16()}], MOVED)
    (mean,) = means.take(ALONE).values()
    assert not mean.requires_grad
    assert mean == 1.0


def test_one_bad_value_shows_in_the_mean() -> None:
    means = Means()
    for value in (1.0, float("nan"), 2.0):
        means.add_all([{"loss": torch.tensor(value)}], MOVED)
    assert math.isnan(read(means.take(ALONE))["loss"])


def test_numbers_on_the_device_and_on_the_host_keep_their_order_and_precision() -> None:
    count = torch.tensor(2.0**40 + 1, dtype=torch.float64)
    given = {"b": torch.tensor(0.1), "a": 3.0, "c": count, "d": torch.tensor(2)}
    found = read(given)
    assert list(found) == list(given)
    assert found == {"b": float(torch.tensor(0.1)), "a": 3.0, "c": 2.0**40 + 1, "d": 2.0}
    assert read({}) == {}


def test_usage_and_perplexity_equal_slow_versions() -> None:
    numbers = random.Random(1)
    codes = [numbers.choice([0, 0, 0, 3, 5, 8]) for _ in range(400)]
    usage = CodeUsage()
    for part in (codes[:100], codes[100:]):
        usage.add(torch.bincount(torch.tensor(part), minlength=10).float())
    found = read(usage.take())
    shares = [codes.count(code) / 400 for code in set(codes)]
    assert found["codebook_usage"] == pytest.approx(len(shares) / 10)
    entropy = -sum(share * math.log(share) for share in shares)
    assert found["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert usage.take() == {}
    usage.add(torch.zeros(10))
    assert all(math.isnan(value) for value in read(usage.take()).values())


def test_all_codes_alike_give_a_perplexity_of_their_number() -> None:
    usage = CodeUsage()
    usage.add(torch.full((16,), 3.0))
    assert read(usage.take()) == pytest.approx({"codebook_usage": 1.0, "codebook_perplexity": 16.0})
