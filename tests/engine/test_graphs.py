"""Recorded passes (`engine.graphs`): steps as without them, under every engine that has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taming_dist.engine.graphs import record_passes
from taming_dist.engine.settings import EngineConfig
from taming_dist.errors import UserError

WORKER = Path(__file__).with_name("graphs_worker.py")


@pytest.fixture(scope="module")
def found(run_worker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What each rank found, by name of the case."""
    return run_worker(WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["one-0", "two-0", "two-1"])
def test_steps_with_recorded_passes_are_those_without_to_the_bit(
    found: dict[str, Any], rank: str
) -> None:
    """Precisions, stages, micro-batches, orders and what is frozen as in the worker."""
    assert len(found[rank]) == 10
    for case, (plain, recorded) in found[rank].items():
        assert recorded == plain, case
        assert plain["lines"][0]["loss"] != plain["lines"][-1]["loss"]


class Net(nn.Module):
    """A pass with an output that no gradient follows, and a weight that it does not use."""

    passes = ("through",)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(3, 2), nn.Parameter(torch.ones(1))
        self.runs = 0

    def through(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.runs += 1
        y = self.layer(x)
        return y.square(), y.detach()


def test_a_recorded_pass_gives_outputs_and_gradients_of_the_plain_one() -> None:
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    assert record_passes(net)
    for _ in range(2):  # gradients of two micro-batches are added up
        x = torch.randn(4, 3)
        both = []
        for one in (net, plain):
            mine = x.clone().requires_grad_()
            squares, rows = one.through(mine)
            assert not rows.requires_grad
            (squares.sum() * 3).backward()
            both.append([squares.detach(), rows, mine.grad, one.layer.weight.grad])
        for ours, theirs in zip(*both, strict=True):
            assert torch.equal(ours, theirs)
    assert net.unused.grad is None


def test_other_shapes_are_recorded_anew_and_evaluation_runs_as_it_is() -> None:
    net = Net()
    record_passes(net)
    for rows in (4, 2, 4):
        assert net.through(torch.randn(rows, 3))[0].shape == (rows, 2)
    assert len(net.through._kept) == 2
    net.eval()
    net.through(torch.randn(5, 3))
    with torch.no_grad():
        net.train().through(torch.randn(6, 3))
    assert len(net.through._kept) == 2


def test_masks_are_drawn_as_if_nothing_had_been_recorded() -> None:
    found = []
    for records in (False, True):
        net = Net()
        net.through = nn.Dropout(0.5).forward
        if records:
            record_passes(net)
        torch.manual_seed(0)
        found.append(net.through(torch.ones(1, 40, requires_grad=True)))
    assert torch.equal(*found)


@pytest.mark.parametrize("other", [{"zero": 3}, {"compile": True}, {"recompute": True}])
def test_what_does_not_go_with_graphs_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="engine.graphs=true is for ZeRO 0 to 2"):
        EngineConfig(graphs=True, **other)
