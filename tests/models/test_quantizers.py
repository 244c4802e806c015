"""Quantizers against brute force, slow loops and the original's values and gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models import quantizers
from taming_dist.models.quantizers import (
    EMAQuantizer,
    EMAQuantizerConfig,
    Statistics,
    VectorQuantizer,
    VectorQuantizerConfig,
    nearest,
    quantizer_config,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "vqgan_quantizers.pt"


def randomness(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(b: int = 3, d: int = 4, side: int = 5) -> Tensor:
    return torch.randn(b, d, side, side, generator=randomness(1))


def ema(**settings: object) -> EMAQuantizer:
    torch.manual_seed(2)
    defaults = {"codes": 12, "dim": 4, "revive_below": 0.0}
    return EMAQuantizer(EMAQuantizerConfig(**defaults | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_nearest_equals_brute_force_for_any_block_size(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(64, 5, generator=randomness())
    entries = torch.randn(17, 5, generator=randomness(1))
    monkeypatch.setattr(quantizers, "SEARCH_BYTES", rows * 4 * len(entries))
    slow = [min(range(17), key=lambda k: float((v - entries[k]).square().sum())) for v in z]
    assert nearest(z, entries).tolist() == slow


def test_ties_go_to_the_lowest_index() -> None:
    entries = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), entries).tolist() == [1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_an_error_and_not_code_0(value: float) -> None:
    z = latents()
    z[1, 2, 3, 4] = value
    for quantizer in (VectorQuantizer(VectorQuantizerConfig(codes=8, dim=4)), ema()):
        with pytest.raises(FloatingPointError, match="not finite"):
            quantizer(z)


@pytest.mark.parametrize("variant", ["legacy", "fixed"])
def test_vector_quantizer_equals_the_original_with_both_gradients(variant: str) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    config = VectorQuantizerConfig(codes=32, dim=16, legacy=variant == "legacy")
    quantizer = VectorQuantizer(config)
    quantizer.load_state_dict({"embedding.weight": golden["entries"]})
    z = golden["z"].clone().requires_grad_(True)
    out = quantizer(z)
    (out.loss + 0.1 * out.z_q.sum()).backward()  # as recorded
    expected = golden[variant]
    assert torch.equal(out.codes.flatten(), expected["indices"])
    torch.testing.assert_close(out.z_q, expected["zq"])
    torch.testing.assert_close(out.loss, expected["loss"])
    torch.testing.assert_close(z.grad, expected["grad_z"])
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected["grad_codebook"])


@pytest.mark.parametrize("kind", ["vector", "normalized", "ema"])
def test_the_straight_through_gradient_is_the_identity(kind: str) -> None:
    normalized = kind != "vector"
    config = VectorQuantizerConfig(codes=12, dim=4, normalized=normalized)
    quantizer = ema() if kind == "ema" else VectorQuantizer(config)
    z = latents().requires_grad_(True)
    weights = torch.randn(z.shape, generator=randomness(3))
    (quantizer(z).z_q * weights).sum().backward()
    twin = latents().requires_grad_(True)
    through = F.normalize(twin, dim=1) if normalized else twin
    (through * weights).sum().backward()
    torch.testing.assert_close(z.grad, twin.grad)


def test_chosen_entries_are_what_lookup_gives_for_the_codes() -> None:
    for quantizer in (VectorQuantizer(VectorQuantizerConfig(codes=12, dim=4)), ema()):
        out = quantizer(latents())
        torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q)


def test_counts_are_how_often_each_code_occurs() -> None:
    out = ema()(latents())
    expected = [int((out.codes == code).sum()) for code in range(12)]
    assert out.statistics.counts.tolist() == expected


def test_quantizers_compute_in_fp32_under_autocast() -> None:
    quantizer = ema()
    expected = quantizer(latents())
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(latents())
    assert out.z_q.dtype == torch.float32
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("normalized", [True, False])
def test_ema_update_equals_a_slow_loop(normalized: bool) -> None:
    quantizer = ema(decay=0.9, normalized=normalized)
    size, total = quantizer.cluster_size.clone(), quantizer.cluster_sum.clone()
    out = quantizer(latents())
    flat = latents().permute(0, 2, 3, 1).reshape(-1, 4)
    if normalized:
        flat = F.normalize(flat, dim=-1)
    quantizer.update(out.statistics, randomness())
    for code in range(12):
        mine = flat[out.codes.flatten() == code]
        new_size = 0.9 * size[code] + 0.1 * len(mine)
        new_total = 0.9 * total[code] + 0.1 * mine.sum(0)
        entry = new_total / new_size
        if normalized:
            entry = F.normalize(entry, dim=0)
        torch.testing.assert_close(quantizer.entries[code], entry)


def test_ema_update_of_a_split_batch_equals_the_whole_batch() -> None:
    whole, split = ema(), ema()
    statistics = whole(latents(b=4)).statistics
    parts = [split(part).statistics for part in latents(b=4).split(2)]
    joined = Statistics(
        parts[0].counts + parts[1].counts,
        parts[0].sums + parts[1].sums,
        torch.cat([part.candidates for part in parts]),
    )
    torch.testing.assert_close(joined.sums, statistics.sums)
    assert torch.equal(joined.counts, statistics.counts)
    assert torch.equal(joined.candidates, statistics.candidates)


def test_dead_codes_are_revived_and_the_next_update_does_not_undo_it() -> None:
    quantizer = ema(decay=0.5, revive_below=0.1)
    z = F.normalize(torch.tensor([[1.0, 0.1, 0.0, 0.0]]).expand(60, 4), dim=-1)
    z = z + 0.01 * torch.randn(60, 4, generator=randomness(4))
    images = z.reshape(15, 2, 2, 4).permute(0, 3, 1, 2)
    revived = sum(quantizer.update(quantizer(images).statistics, randomness(n)) for n in range(8))
    assert revived >= 6
    fresh = (F.normalize(z, dim=-1).mean(0) @ quantizer.entries.T) > 0.99
    assert fresh.sum() >= 6  # they stand where the latents are ...
    before = quantizer.entries.clone()
    none = Statistics(torch.zeros(12), torch.zeros(12, 4), torch.zeros(0, 1, 4))
    quantizer.update(none, randomness())
    torch.testing.assert_close(quantizer.entries[fresh], before[fresh])  # ... and stay


def test_revival_never_makes_more_codes_than_there_are_latents() -> None:
    quantizer = ema(decay=0.0, revive_below=0.5)
    one_image = latents(b=1, side=1)
    assert quantizer.update(quantizer(one_image).statistics, randomness()) == 1


def test_evaluation_gathers_no_statistics_for_updates() -> None:
    statistics = ema().eval()(latents()).statistics
    assert statistics.sums is None
    assert statistics.candidates is None


def test_an_unknown_quantizer_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"model\.quantizer\.name=foo: use one of"):
        quantizer_config({"name": "foo"})
