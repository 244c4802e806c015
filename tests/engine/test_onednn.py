"""The CPU's products of fp32 are made by the faster library, and never rounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.engine import onednn
from taming_dist.engine.tf32 import EXACT, use_tf32

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fp32 on a GPU is TF32's matter")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    onednn._nothing_is_rounded.cache_clear()
    yield
    onednn._nothing_is_rounded.cache_clear()
    use_tf32(EXACT)


def test_where_mkl_is_slow_it_is_onednn_that_keeps_every_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    use_tf32(EXACT)
    kept = onednn._nothing_is_rounded()
    assert torch.get_float32_matmul_precision() == ("medium" if kept else "highest")
    torch.manual_seed(0)
    for shapes in (((64, 96), (96, 80)), ((3, 64, 96), (3, 96, 80))):
        a, b = (torch.randn(shape) for shape in shapes)
        error = (a @ b - (a.double() @ b.double()).float()).abs().max()
        assert error < 1e-4  # bf16 rounds by 0.1, TF32 by 0.02


def test_a_processor_that_would_round_is_not_allowed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(one: Tensor, other: Tensor) -> Any:
        return torch.einsum("...ij,...jk->...ik", one.bfloat16().float(), other)

    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(Tensor, "__matmul__", rounded)
    assert not onednn.multiplies()
    use_tf32(EXACT)
    assert torch.get_float32_matmul_precision() == "highest"


def test_where_mkl_is_fast_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: False)
    torch.set_float32_matmul_precision("medium")
    use_tf32(EXACT)
    assert torch.get_float32_matmul_precision() == "highest"
