"""Quantizers reduced to the codes in use, against the original's remap where that is certain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.quantizers import (
    BSQuantizerConfig,
    EMAQuantizerConfig,
    FSQuantizerConfig,
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    LFQuantizerConfig,
    SimVQConfig,
    VectorQuantizerConfig,
    build_quantizer,
    keep_used,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "vqgan_quantizers.pt"
USED = torch.tensor([1, 2, 5, 7, 11])


def reduced(config: Any, quantizer: Any, used: Tensor) -> Any:
    smaller, state = keep_used(config, quantizer.state_dict(), used)
    made = build_quantizer(smaller).eval()
    made.load_state_dict(state)
    return made


def test_used_codes_get_the_originals_numbers_and_the_others_the_nearest_of_them() -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    state = dict(golden["vq2_remap"]["state"])
    used = state.pop("used")
    config = VectorQuantizerConfig(codes=32, dim=16)
    whole = build_quantizer(config)
    whole.load_state_dict(state)
    found = reduced(config, whole, used)(golden["z"]).codes.flatten()
    theirs = golden["vq2_remap"]["indices"].flatten()
    known = theirs < len(used)  # the original gives the extra number 16 to the others
    assert 0 < known.sum() < len(known)
    assert torch.equal(found[known], theirs[known])
    flat = golden["z"].permute(0, 2, 3, 1).reshape(-1, 16)
    nearest = torch.cdist(flat, state["embedding.weight"][used]).argmin(1)
    assert torch.equal(found, nearest)


@pytest.mark.parametrize(
    "config",
    [
        VectorQuantizerConfig(codes=12, dim=4, normalized=True, initial="data", revive_below=0.1),
        EMAQuantizerConfig(codes=12, dim=4),
        GumbelQuantizerConfig(codes=12, dim=4),
        IndexQuantizerConfig(codes=12, dim=4),
        SimVQConfig(codes=12, dim=4),
    ],
    ids=lambda config: config.name,
)
def test_vectors_of_kept_codes_keep_their_entries(config: Any) -> None:
    torch.manual_seed(0)
    whole = build_quantizer(config).eval()
    smaller = reduced(config, whole, USED)
    assert smaller.vocabulary == len(USED)
    z = torch.randn(2, 4, 8, 8)
    before, after = whole(z), smaller(z)
    kept = torch.isin(before.codes, USED)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(USED[after.codes[kept]], before.codes[kept])
    torch.testing.assert_close(smaller.lookup(after.codes), whole.lookup(USED[after.codes]))


@pytest.mark.parametrize(
    "config",
    [FSQuantizerConfig(levels=[4, 3]), LFQuantizerConfig(bits=3), BSQuantizerConfig(bits=3)],
)
def test_codes_that_are_combinations_cannot_be_left_out(config: Any) -> None:
    with pytest.raises(UserError, match=f"{config.name}: its codes are combinations"):
        keep_used(config, {}, USED)


@pytest.mark.parametrize("used", [[], [0, 12], [-1], [3, 3]])
def test_codes_that_do_not_exist_or_come_twice_are_refused(used: list[int]) -> None:
    config = VectorQuantizerConfig(codes=12, dim=4)
    with pytest.raises(UserError, match="different numbers from 0 to 11"):
        keep_used(config, {}, torch.tensor(used, dtype=torch.int64))
