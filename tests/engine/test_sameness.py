"""What every rank holds whole is compared at a snapshot, at every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.engine.sameness import difference, digests

WORKER = Path(__file__).with_name("sameness_worker.py")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_a_digest(dtype: torch.dtype) -> None:
    values = torch.arange(5).to(dtype)
    before = digests([("a", values), ("empty", values[:0])])
    assert before == digests([("a", values.clone()), ("empty", values[:0])])
    bits = values.view(torch.uint8)
    for byte in range(len(bits)):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            assert digests([("a", values)])["a"] != before["a"]
            bits[byte] ^= 1 << bit


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([1], None),
        ([1, 1, 1], None),
        ([1, 2], "w is not the same on ranks 0 and 1"),
        ([1, 1, 2], "w on rank 2 is not what it is on the others"),
        ([2, 1, 1], "w on rank 0 is not what it is on the others"),
        ([1, 2, 1, 3, 1], "w on ranks 1, 3 is not what it is on the others"),
    ],
)
def test_the_ranks_in_the_minority_are_named(told: list[int], expected: str | None) -> None:
    assert difference([{"same": 0, "w": digest} for digest in told]) == expected


@pytest.fixture(scope="module")
def found(run_worker: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    return run_worker(WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_one_bit_of_a_weight_or_buffer_on_one_rank_is_noticed_and_nothing_is_copied(
    found: dict[str, Any], zero: int
) -> None:
    alone, *pair = (found[name] for name in ("one-0", "two-0", "two-1"))
    for rank in (alone, *pair):
        assert rank[f"zero{zero} healthy"] == [None, True]
    assert alone[f"zero{zero} weight"] == [None, True]
    where = "is not the same on ranks 0 and 1"
    for rank in pair:
        assert rank[f"zero{zero} buffer"] == f"buffers/seen {where}"
        assert rank[f"zero{zero} weight"] == [f"weights/before.bias {where}", False]
