"""What is counted of a network before a run starts is what engines hold of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.engine.footprint import Footprint, footprint
from taming_dist.engine.settings import EngineConfig
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

WORKER = Path(__file__).with_name("footprint_worker.py")
MODEL = {"vocabulary": 64, "grid": [4, 4], "layers": 2, "heads": 4, "width": 64}
RANKS = 2


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_worker(WORKER, worlds=("two",))


def counted(zero: int, ranks: int = RANKS) -> Footprint:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**MODEL, condition=ClassCondition(3)))
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine = EngineConfig(zero=zero, persist_below=1000)
    return footprint(sizes, engine, ranks, averaged=True)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_a_rank_holds_what_was_counted(found: dict[str, Any], zero: int) -> None:
    """ZeRO 2 shares gradients out by whole tensors, some of which have a tenth of all numbers and
    more: one rank has more than the other."""
    ranks = [found[f"two-{rank}"][f"zero{zero}"] for rank in range(RANKS)]
    for name in ("weights", "gradients", "optimizer", "average"):
        for held in ranks:
            share = 0.25 if (zero, name) == (2, "gradients") else 0.002
            assert held[name] == pytest.approx(getattr(counted(zero), name), rel=share), name


@pytest.mark.slow
def test_the_buckets_of_the_engines_made_so_far_are_those_that_were_counted(
    found: dict[str, Any],
) -> None:
    buckets = 0.0
    for zero in range(4):
        buckets += counted(zero).buckets
        assert found["two-0"][f"zero{zero}"]["other"] == pytest.approx(buckets, abs=4e6)


def test_more_ranks_hold_less_each_of_what_a_stage_cuts() -> None:
    one, many = counted(3, ranks=1), counted(3, ranks=64)
    assert one.gradients == 64 * many.gradients
    assert counted(0, ranks=64) == counted(0, ranks=1)
    assert many.device < counted(1, ranks=64).device


def test_offload_has_the_optimizer_and_the_average_on_the_host() -> None:
    device = footprint([1000], EngineConfig(zero=2), 2, averaged=True)
    there = footprint([1000], EngineConfig(zero=2, offload="optimizer"), 2, averaged=True)
    assert (there.optimizer, there.average) == (0, 0)
    assert there.host == device.optimizer + device.average == 4 * 1000 * (3 + 1) / 2
    assert there.device == device.weights + device.gradients
