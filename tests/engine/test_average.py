"""The weights' moving average, sharded by ZeRO: on one and two ranks, beside a slow whole one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.engine.average import WeightAverage
from taming_dist.models.prior.blocks import LlamaBlockConfig
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

WORKER = Path(__file__).with_name("average_worker.py")
SIZES: dict[str, Any] = {"vocabulary": 8, "grid": [2, 3], "layers": 1, "heads": 2, "width": 8}
SIZES["block"] = LlamaBlockConfig()  # as the worker has it
MOVED = torch.tensor(True)


@pytest.fixture(scope="module")
def found(run_worker: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The differences by process, then by ZeRO stage and accumulation."""
    return run_worker(WORKER)


STAGES = pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])


def of_stage(found: dict, stage: str) -> list[dict[str, Any]]:
    """The results of a stage in every process and with every accumulation."""
    return [
        result
        for results in found.values()
        for name, result in results.items()
        if name.startswith(stage)
    ]


@pytest.mark.slow
@STAGES
def test_the_sharded_average_is_the_average_of_whole_weights(found: dict, stage: str) -> None:
    for result in of_stage(found, stage):
        for name in ("used", "export", "after loading"):
            assert result[name] < 1e-6, name
        assert result["answers"] < 1e-5
        assert result["average differs from the weights"] > 1e-3


@pytest.mark.slow
@STAGES
def test_a_checkpoint_does_not_bring_the_optimizers_settings_back(found: dict, stage: str) -> None:
    for result in of_stage(found, stage):
        expected = [[0.25, [0.5, 0.99], 0.3], [0.25, [0.5, 0.99], 0.0]]
        assert result["groups after loading"] == expected


@pytest.mark.slow
@STAGES
def test_an_evaluation_leaves_weights_average_and_modes_as_they_were_to_the_bit(
    found: dict, stage: str
) -> None:
    assert all(result["same after looking"] for result in of_stage(found, stage))


@pytest.mark.slow
@STAGES
def test_an_evaluation_that_fails_leaves_the_training_as_it_was(found: dict, stage: str) -> None:
    for result in of_stage(found, stage):
        assert result["masters after an error"]
        assert result["same after an error"]


@pytest.mark.slow
@STAGES
def test_every_part_of_the_average_is_written_once(found: dict, stage: str) -> None:
    parameters = sum(
        parameter.numel() for parameter in Transformer(TransformerConfig(**SIZES)).parameters()
    )
    for result in of_stage(found, stage):
        assert result["numbers"] == parameters


@pytest.mark.slow
@STAGES
def test_a_checkpoint_of_before_is_read(found: dict, stage: str) -> None:
    for result in of_stage(found, stage):
        assert result["after loading one of before"] < 1e-6
        assert result["same as one of before"]


def test_a_weight_counts_half_after_the_half_life() -> None:
    average = WeightAverage([torch.zeros(1)], half_life=300, images_per_step=3)
    average.steps.fill_(10_000)  # past the warm-up
    for _ in range(100):
        average.update([torch.ones(1)], MOVED)
    assert float(average.shards[0]) == pytest.approx(0.5, abs=1e-4)


def test_a_young_average_follows_its_weights_closely() -> None:
    average = WeightAverage([torch.zeros(1)], half_life=1e9, images_per_step=1)
    average.update([torch.ones(1)], MOVED)
    assert float(average.shards[0]) == pytest.approx(10 / 11)


def test_a_skipped_step_leaves_the_average_and_its_age_to_the_bit() -> None:
    weights = [torch.rand(5), torch.rand(3)]
    average = WeightAverage(weights, half_life=30, images_per_step=3)
    average.update([torch.rand(5), torch.rand(3)], MOVED)
    before = [shard.clone() for shard in average.shards]
    average.update([torch.rand(5), torch.rand(3)], ~MOVED)
    assert all(torch.equal(a, b) for a, b in zip(average.shards, before, strict=True))
    assert average.steps == 1
