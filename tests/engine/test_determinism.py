"""What engine.deterministic switches, on and off again, in one place."""

import os
from collections.abc import Iterator

import pytest
import torch

from taming_dist.engine.determinism import CUBLAS, use_deterministic
from taming_dist.engine.world import choose_device


@pytest.fixture(autouse=True)
def reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CUBLAS, "")
    yield
    use_deterministic(False)


def flags() -> list[bool]:
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        not torch.backends.cudnn.benchmark,
    ]


def test_a_command_is_deterministic_if_it_asks_for_that_whatever_was_set_before() -> None:
    torch.backends.cudnn.benchmark = True
    choose_device(deterministic=True)
    assert flags() == [True, True, True]
    assert os.environ[CUBLAS] == ":4096:8"
    choose_device()
    assert flags() == [False, False, True]


def test_where_there_is_no_deterministic_way_torch_refuses() -> None:
    use_deterministic(True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))


def test_new_tensors_are_not_filled() -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory
    use_deterministic(True)
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("found", "kept"), [(":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_a_workspace_of_cublas_that_keeps_the_order_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, found: str, kept: str
) -> None:
    monkeypatch.setenv(CUBLAS, found)
    use_deterministic(True)
    assert os.environ[CUBLAS] == kept
