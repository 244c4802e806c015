"""Entries from the data: drawn, clustered, and found dead."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.models.quantizers import restarts


def randomness(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool(count: int = 40, d: int = 3) -> Tensor:
    return torch.randn(count, d, generator=randomness(1))


def test_no_latent_is_drawn_twice_while_there_are_enough() -> None:
    drawn = restarts.draw(pool(), 40, randomness())
    assert sorted(drawn.tolist()) == sorted(pool().tolist())
    assert drawn.tolist() != pool().tolist()


def test_a_small_pool_is_gone_through_again_with_noise() -> None:
    drawn = restarts.draw(pool(10), 25, randomness())
    assert len(drawn.unique(dim=0)) == 25
    assert float(torch.cdist(drawn, pool(10)).min(1).values.max()) < 0.1


@pytest.mark.parametrize("normalized", [True, False])
def test_clusters_equal_a_slow_loop(normalized: bool) -> None:
    points = F.normalize(pool(), dim=1) if normalized else pool()
    start = points[:5]
    slow = start.clone()
    for _ in range(restarts.KMEANS_ROUNDS):
        mine = torch.cdist(points, slow).argmin(1)
        for k in range(5):
            if (mine == k).any():
                mean = points[mine == k].mean(0)
                slow[k] = F.normalize(mean, dim=0) if normalized else mean
    torch.testing.assert_close(restarts.kmeans(points, start, normalized), slow)


def test_a_cluster_without_members_keeps_its_place() -> None:
    start = torch.tensor([[0.0, 0.0, 0.0], [99.0, 99.0, 99.0]])
    assert torch.equal(restarts.kmeans(pool(), start, False)[1], start[1])


def test_candidates_are_spread_evenly_over_the_image() -> None:
    latents = torch.arange(20.0).view(1, 20, 1)
    assert restarts.candidates(latents, at_start=False).flatten().tolist() == [0, 5, 10, 15]
    assert restarts.candidates(latents, at_start=True).flatten().tolist() == list(range(20))


def test_usage_finds_the_dead_and_gives_the_restarted_their_time() -> None:
    usage = restarts.Usage(4)
    counts = torch.tensor([30.0, 10.0, 0.0, 0.0])
    steps = next(n for n in range(500) if usage.dead(counts, 0.1, limit=1).any())
    assert 10 < steps < 200
    # 2 has been restarted
    assert usage.dead(counts, 0.1, limit=9).tolist() == [False, False, False, True]
    assert not usage.dead(counts, 0.1, limit=9).any()


@pytest.mark.parametrize("limit", [0, 1, 2, 9])
def test_the_first_dead_codes_are_those_of_a_slow_loop(limit: int) -> None:
    usage = torch.tensor([9.0, 0.1, 5.0, 0.0, 0.2, 7.0])
    slow = [code for code in range(6) if usage[code] < 0.1 * usage.mean()][:limit]
    assert restarts.dead_codes(usage, 0.1, limit).nonzero().flatten().tolist() == slow


def test_the_nth_dead_code_takes_the_nth_latent_of_a_random_order() -> None:
    dead = torch.tensor([False, True, True, False, True])
    order = torch.randperm(40, generator=randomness()).tolist()
    given = restarts.replacements(pool(), dead, randomness())
    assert given.shape == (5, 3)
    for code, place in zip((1, 2, 4), order[:3], strict=True):
        assert torch.equal(given[code], pool()[place])
