"""The codebook as a moving average against slow loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.models.quantizers import EMAQuantizer, EMAQuantizerConfig, Statistics


def randomness(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(b: int = 3, d: int = 4, side: int = 5) -> Tensor:
    return torch.randn(b, d, side, side, generator=randomness(1))


def ema(**settings: object) -> EMAQuantizer:
    torch.manual_seed(2)
    defaults = {"codes": 12, "dim": 4, "revive_below": 0.0}
    return EMAQuantizer(EMAQuantizerConfig(**defaults | settings))  # type: ignore[arg-type]


def update(quantizer: EMAQuantizer, statistics: Statistics, seed: int = 0) -> int:
    def untouched(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        raise AssertionError("no optimizer owns these entries")

    return int(quantizer.update(statistics, randomness(seed), untouched))


def test_the_straight_through_gradient_is_the_identity() -> None:
    z = latents().requires_grad_(True)
    weights = torch.randn(z.shape, generator=randomness(3))
    (ema()(z).z_q * weights).sum().backward()
    twin = latents().requires_grad_(True)
    (F.normalize(twin, dim=1) * weights).sum().backward()
    torch.testing.assert_close(z.grad, twin.grad)


@pytest.mark.parametrize("normalized", [True, False])
def test_an_update_equals_a_slow_loop(normalized: bool) -> None:
    quantizer = ema(decay=0.9, normalized=normalized)
    size, total = quantizer.cluster_size.clone(), quantizer.cluster_sum.clone()
    out = quantizer(latents())
    flat = latents().permute(0, 2, 3, 1).reshape(-1, 4)
    if normalized:
        flat = F.normalize(flat, dim=-1)
    update(quantizer, out.statistics)
    for code in range(12):
        mine = flat[out.codes.flatten() == code]
        new_size = 0.9 * size[code] + 0.1 * len(mine)
        new_total = 0.9 * total[code] + 0.1 * mine.sum(0)
        entry = new_total / new_size
        if normalized:
            entry = F.normalize(entry, dim=0)
        torch.testing.assert_close(quantizer.entries[code], entry)


def test_the_statistics_of_a_split_batch_are_those_of_the_whole_batch() -> None:
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


def test_dead_codes_are_restarted_and_the_next_update_does_not_undo_it() -> None:
    quantizer = ema(decay=0.5, revive_below=0.1)
    z = F.normalize(torch.tensor([[1.0, 0.1, 0.0, 0.0]]).expand(60, 4), dim=-1)
    z = z + 0.01 * torch.randn(60, 4, generator=randomness(4))
    images = z.reshape(15, 2, 2, 4).permute(0, 3, 1, 2)
    restarted = sum(update(quantizer, quantizer(images).statistics, seed) for seed in range(8))
    assert restarted >= 6
    fresh = (F.normalize(z, dim=-1).mean(0) @ quantizer.entries.T) > 0.99
    assert fresh.sum() >= 6  # they stand where the latents are ...
    before = quantizer.entries.clone()
    update(quantizer, Statistics(torch.zeros(12), torch.zeros(12, 4), torch.zeros(1, 1, 4)))
    torch.testing.assert_close(quantizer.entries[fresh], before[fresh])  # ... and stay


def test_restarts_never_make_more_codes_than_there_are_latents() -> None:
    quantizer = ema(decay=0.0, revive_below=0.5)
    assert update(quantizer, quantizer(latents(b=1, side=1)).statistics) == 1


@pytest.mark.parametrize("initial", ["data", "kmeans"])
def test_the_first_update_sets_the_codebook_and_the_averages_start_from_it(initial: str) -> None:
    quantizer = ema(initial=initial, codes=6, decay=0.9)
    before = quantizer(latents())
    update(quantizer, before.statistics)
    first = quantizer.entries.clone()
    after = quantizer(latents())
    assert float(after.loss) < 0.8 * float(before.loss)
    assert after.statistics.candidates.shape[1] < before.statistics.candidates.shape[1]
    assert float(quantizer.cluster_size.sum()) == pytest.approx(75)
    update(quantizer, after.statistics)
    assert float((first * quantizer.entries).sum(1).min()) > 0.9  # moved a little, not anew
    again = ema(initial=initial, codes=6)
    again.load_state_dict(quantizer.state_dict())
    assert again(latents()).statistics.candidates.shape == after.statistics.candidates.shape
