"""What fp32 means is said in every command, whatever torch or anyone else has set before."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from taming_dist.engine.tf32 import use_tf32
from taming_dist.engine.world import choose_device

HAS_FLAGS_OF_OPERATIONS = hasattr(torch.backends, "fp32_precision")


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    use_tf32(False)
    torch.backends.cudnn.allow_tf32 = True
    if HAS_FLAGS_OF_OPERATIONS:
        torch.backends.fp32_precision = "none"


def medium() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def mixed(precision: str) -> None:
    """By the new names only, after which reading an old one raises."""
    torch.backends.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


BEFORE: list[Callable[[], None]] = [lambda: None, medium, lambda: use_tf32(True)]
if HAS_FLAGS_OF_OPERATIONS:
    BEFORE += [lambda: mixed("tf32"), lambda: mixed("ieee")]


def flags() -> list[bool]:
    """Whether each kind of operation may use TF32, by the old names and by the new."""
    found = [
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision() == "high",
    ]
    if HAS_FLAGS_OF_OPERATIONS:
        cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
        found += [part.fp32_precision == "tf32" for part in (cuda.matmul, cudnn.conv, cudnn.rnn)]
        assert {part.fp32_precision for part in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)} == {
            "ieee"
        }
    return found


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("before", BEFORE)
def test_every_flag_is_what_was_asked_for_whatever_it_was(
    allowed: bool, before: Callable[[], None]
) -> None:
    before()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_tf32(allowed)
        assert set(flags()) == {allowed}


def test_a_command_computes_exactly_unless_it_asks_for_tf32() -> None:
    for allowed in (False, True, False):
        choose_device(tf32=allowed)
        assert set(flags()) == {allowed}
    torch.backends.cudnn.allow_tf32 = True
    choose_device()
    assert set(flags()) == {False}
