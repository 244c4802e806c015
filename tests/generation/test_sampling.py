"""Choosing codes: strategies against slow, obvious versions, draws against frequencies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.draws import uniforms
from taming_dist.generation.sampling import (
    Sampling,
    draw,
    keep_top_k,
    keep_top_p,
)

CPU = torch.device("cpu")
LOGIT = st.floats(-20, 20, width=32)
ROWS = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(LOGIT, min_size=width, max_size=width), min_size=1, max_size=3)
)


def kept(logits: Tensor) -> list[set[int]]:
    return [{v for v, logit in enumerate(row) if logit > -math.inf} for row in logits.tolist()]


def obvious_top_k(row: list[float], k: int) -> set[int]:
    worst = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return {token for token, logit in enumerate(row) if logit >= worst}


def obvious_top_p(row: list[float], p: float) -> set[int]:
    weights = [math.exp(logit - max(row)) for logit in row]
    nucleus: set[int] = set()
    for token in sorted(range(len(row)), key=lambda token: -row[token]):
        if sum(weights[member] for member in nucleus) / sum(weights) >= p:
            break
        nucleus.add(token)
    return nucleus


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, k=st.integers(1, 14))
def test_top_k_keeps_what_sorting_keeps(rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    filtered = keep_top_k(logits, k)
    assert kept(filtered) == [obvious_top_k(row, k) for row in rows]
    assert torch.equal(filtered[filtered > -torch.inf], logits[filtered > -torch.inf])


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, p=st.floats(0.01, 0.99))
def test_top_p_keeps_what_adding_up_one_by_one_keeps(rows: list[list[float]], p: float) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    assert kept(keep_top_p(logits, p)) == [obvious_top_p(row, p) for row in rows]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()
    assert kept(keep_top_p(logits, 0.01)) == [{1}]
    assert kept(keep_top_p(logits, 0.6)) == [{1, 3}]
    assert kept(keep_top_p(logits, 0.8)) == [{0, 1, 3}]


def test_a_draw_inverts_the_cumulative_probability() -> None:
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(6, 4)
    given = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, given).tolist() == [0, 0, 2, 2, 3, 3]


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, k=st.integers(1, 12), uniform=st.sampled_from([0.0, 0.3, 1 - 2**-53]))
def test_a_draw_never_leaves_the_filtered_tokens(
    rows: list[list[float]], k: int, uniform: float
) -> None:
    logits = keep_top_k(torch.tensor(rows), k)
    tokens = draw(logits, torch.full((len(rows),), uniform, dtype=torch.float64))
    assert all(token in row for token, row in zip(tokens.tolist(), kept(logits), strict=True))


def test_draws_have_the_frequencies_of_the_distribution_at_each_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = uniforms(0, [0], 20_000, CPU)[0]
    for temperature in (0.5, 1.0, 2.0):
        sampling = Sampling(temperature=temperature)
        tokens = sampling.choose(logits.expand(20_000, 4), drawn)
        shares = tokens.bincount(minlength=4) / 20_000
        assert torch.allclose(shares, (logits / temperature).softmax(0), atol=0.015)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    chosen = Sampling(temperature=0).choose(logits, torch.tensor([0.99, 0.99]))
    assert chosen.tolist() == [1, 0]


def test_each_filter_works_alone_and_zero_or_none_switches_it_off() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    late = torch.tensor([0.999], dtype=torch.float64)
    assert Sampling(top_k=2).choose(logits, late).item() == 1
    assert Sampling(top_p=0.8).choose(logits, late).item() == 2
    assert Sampling(top_k=0).choose(logits, late).item() == 3
    assert Sampling(top_k=None, top_p=1.0).choose(logits, late).item() == 3
    # After top-k 2 the shares are 4/7 and 3/7: half the probability is the first token alone.
    assert Sampling(top_k=2, top_p=0.5).choose(logits, late).item() == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_knobs_outside_their_range_are_refused(knobs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**knobs)
