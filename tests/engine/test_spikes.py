"""Spikes of a gradient's norm: what stands out is skipped, what stays is followed."""

import json

import pytest
import torch

from taming_dist.engine.spikes import MOST_IN_A_ROW, WINDOW, Spikes

CPU = torch.device("cpu")


def norms(count: int, mean: float = 1.0, seed: int = 0) -> list[float]:
    """Norms with a standard deviation of a tenth of their mean."""
    randomness = torch.Generator().manual_seed(seed)
    return (mean * (1 + 0.1 * torch.randn(count, generator=randomness))).tolist()


def judged(spikes: Spikes, values: list[float]) -> list[bool]:
    return [bool(spikes.judge(torch.tensor(value))) for value in values]


def settled(deviations: float = 6.0) -> Spikes:
    """One that has seen as many norms as it judges by."""
    spikes = Spikes(deviations, CPU)
    judged(spikes, norms(WINDOW))
    return spikes


def test_only_what_stands_out_by_so_many_deviations_is_a_spike() -> None:
    assert judged(settled(), [1.4]) == [True]
    assert judged(settled(), [1.8]) == [False]
    assert judged(settled(), [0.0]) == [True]
    assert judged(settled(10.0), [1.8]) == [True]


def test_nothing_is_a_spike_before_the_window_is_full_or_where_it_is_off() -> None:
    assert judged(Spikes(6.0, CPU), [*norms(WINDOW - 1), 1e6]) == [True] * WINDOW
    off = settled(0.0)
    assert judged(off, [1e6, float("inf"), float("nan")]) == [True, False, False]
    assert off.state_dict() == {}


def test_a_spike_hardly_widens_what_comes_after_it() -> None:
    spikes = settled()
    assert judged(spikes, [1e6, 1.8, 1e6, 1.0]) == [False, False, False, True]


def test_norms_that_rise_for_good_are_followed_and_learned_anew() -> None:
    spikes = settled()
    risen = judged(spikes, norms(WINDOW + 20, mean=100.0, seed=1))
    assert risen == [False] * MOST_IN_A_ROW + [True] * (WINDOW + 20 - MOST_IN_A_ROW)
    assert judged(spikes, [300.0, 100.0]) == [False, True]


def test_a_norm_that_is_not_finite_is_no_spike_and_does_not_count() -> None:
    spikes = settled()
    before = spikes.state_dict()
    assert judged(spikes, [float("nan"), float("inf")]) == [False, False]
    assert spikes.state_dict() == before


@pytest.mark.parametrize("seen", [5, WINDOW + 5])
def test_a_resumed_run_judges_the_same(seen: int) -> None:
    whole, parts = Spikes(2.0, CPU), Spikes(2.0, CPU)
    values = norms(seen + WINDOW)
    judged(whole, values[:seen])
    parts.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert judged(whole, values[seen:]) == judged(parts, values[seen:])
    assert whole.state_dict() == parts.state_dict()
    assert not all(judged(whole, values))


def test_a_run_from_before_there_were_spikes_begins_anew() -> None:
    spikes = settled()
    before = spikes.state_dict()
    spikes.load_state_dict({})
    assert spikes.state_dict() == before
