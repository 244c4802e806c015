"""What fp32 means is said in every command, whatever torch or anyone else has set before."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from taming_dist.engine import onednn
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.tf32 import EXACT, TF32, TF32_CHOICES, use_tf32
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError

HAS_FLAGS_OF_OPERATIONS = hasattr(torch.backends, "fp32_precision")


@pytest.fixture(autouse=True)
def defaults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: False)
    yield
    use_tf32(EXACT)
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


BEFORE: list[Callable[[], None]] = [lambda: None, medium, lambda: use_tf32(TF32_CHOICES["all"])]
if HAS_FLAGS_OF_OPERATIONS:
    BEFORE += [lambda: mixed("tf32"), lambda: mixed("ieee")]


def flags() -> TF32:
    """What may use TF32, the same by the old names and by the new."""
    convolutions = {torch.backends.cudnn.allow_tf32}
    products = {
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision() == "high",
    }
    if HAS_FLAGS_OF_OPERATIONS:
        cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
        convolutions |= {part.fp32_precision == "tf32" for part in (cudnn.conv, cudnn.rnn)}
        products |= {cuda.matmul.fp32_precision == "tf32"}
        assert {part.fp32_precision for part in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)} == {
            "ieee"
        }
    assert len(convolutions) == len(products) == 1
    return TF32(convolutions.pop(), products.pop())


@pytest.mark.parametrize("allowed", TF32_CHOICES.values())
@pytest.mark.parametrize("before", BEFORE)
def test_every_flag_is_what_was_asked_for_whatever_it_was(
    allowed: TF32, before: Callable[[], None]
) -> None:
    before()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_tf32(allowed)
        assert flags() == allowed


def test_a_command_computes_exactly_unless_it_asks_for_tf32() -> None:
    for allowed in (EXACT, TF32_CHOICES["all"], EXACT):
        choose_device(tf32=allowed)
        assert flags() == allowed
    torch.backends.cudnn.allow_tf32 = True
    choose_device()
    assert flags() == EXACT


def test_fp32_is_exact_and_half_precision_spares_its_convolutions_unless_told_otherwise() -> None:
    found = {name: EngineConfig(precision=name).allowed_tf32 for name in ("fp32", "bf16", "fp16")}
    spared = TF32_CHOICES["convolutions"]
    assert found == {"fp32": EXACT, "bf16": spared, "fp16": spared}
    assert EngineConfig(precision="bf16", tf32="none").allowed_tf32 == EXACT
    with pytest.raises(UserError, match="engine.tf32=true: use auto, none, convolutions or all"):
        EngineConfig(tf32="true")
