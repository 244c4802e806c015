"""What ZeRO stages share: first weights, evaluations; and what a rank of ZeRO 3 never has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.errors import UserError

WORKER = Path(__file__).with_name("partition_worker.py")
PROCESSES = ["one-0", "two-0"]  # digests and pictures are the first rank's
LARGEST = 4 * 64 * 64 + 4 * 64  # parameters of the largest layer
ACTS = ["building", "training", "validation", "preview", "export"]


@pytest.fixture(scope="module")
def found(run_worker: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    return run_worker(WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("process", PROCESSES)
def test_a_seed_gives_the_same_weights_at_every_stage_and_number_of_ranks(
    found: dict[str, Any], process: str, zero: int
) -> None:
    first, reference = found[process][f"zero{zero} first"], found["one-0"]["zero0 first"]
    assert first == reference
    assert first["started"] == first["given"] != first["transformer"]
    assert {"generator", "discriminator"} <= first.keys()


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("process", PROCESSES)
def test_validation_and_previews_with_an_average_are_the_same_at_every_stage(
    found: dict[str, Any], process: str, zero: int
) -> None:
    looks, reference = found[process][f"zero{zero} looks"], found["one-0"]["zero0 looks"]
    assert looks["nll"] == pytest.approx(reference["nll"], rel=1e-5)
    assert looks["picture"] == reference["picture"]


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rank", ["two-0", "two-1"])
def test_a_rank_of_zero_3_holds_its_share_and_a_few_layers_of_the_weights(
    found: dict[str, Any], rank: str, act: str
) -> None:
    held = found[rank]["zero3 held"]
    assert held["all"] / 2 <= held[act] <= held["all"] / 2 + 2 * LARGEST < 0.6 * held["all"]


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_without_zero_3_the_same_measurement_finds_the_whole_network_once(
    found: dict[str, Any], act: str
) -> None:
    held = found["two-1"]["zero0 held"]
    assert held[act] == held["all"]


@pytest.mark.parametrize("width", [2**27, 2**40])  # of more bytes than there are, than can be told
def test_a_network_without_the_memory_for_it_is_refused(width: int) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="a network does not fit in memory: make it smaller"):
        build_network(lambda: nn.Embedding(width, width), EngineConfig(), world)
    with pytest.raises(RuntimeError, match="another fault"):
        build_network(faulty, EngineConfig(), world)


def faulty() -> nn.Module:
    raise RuntimeError("another fault")
