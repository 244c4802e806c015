"""Choosing codes: strategies against slow, obvious versions, draws against frequencies."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taming_dist.generation.sampling as sampling_module
from taming_dist.errors import UserError
from taming_dist.generation.draws import uniforms
from taming_dist.generation.sampling import (
    Sampling,
    draw,
    truncated,
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


def obvious_top_p(row: list[float], p: float, tokens: set[int]) -> set[int]:
    """Of these tokens."""
    weights = {token: math.exp(row[token] - max(row)) for token in tokens}
    nucleus: set[int] = set()
    for token in sorted(tokens, key=lambda token: -row[token]):
        if sum(weights[member] for member in nucleus) / sum(weights.values()) >= p:
            break
        nucleus.add(token)
    return {token for token in tokens if row[token] >= min(row[member] for member in nucleus)}


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, k=st.integers(1, 14))
def test_top_k_keeps_what_sorting_keeps(rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    filtered = truncated(logits, k, None)
    assert kept(filtered) == [obvious_top_k(row, k) for row in rows]
    assert torch.equal(filtered[filtered > -torch.inf], logits[filtered > -torch.inf])


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, k=st.none() | st.integers(1, 14), p=st.floats(0.01, 0.99))
def test_top_p_keeps_what_adding_up_one_by_one_keeps_of_what_top_k_has_left(
    rows: list[list[float]], k: int | None, p: float
) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    expected = [obvious_top_p(row, p, obvious_top_k(row, k or len(row))) for row in rows]
    assert kept(truncated(logits, k, p)) == expected


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()
    assert kept(truncated(logits, None, 0.01)) == [{1}]
    assert kept(truncated(logits, None, 0.6)) == [{1, 3}]
    # one of the two last would do, but they are as likely as each other
    assert kept(truncated(logits, None, 0.8)) == [{0, 1, 2, 3}]
    assert kept(truncated(logits, 3, 0.8)) == [{0, 1, 2, 3}]
    assert kept(truncated(logits, 2, 0.6)) == [{1}]


def test_a_draw_inverts_the_cumulative_probability() -> None:
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(6, 4)
    given = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, given).tolist() == [0, 0, 2, 2, 3, 3]


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, k=st.integers(1, 12), uniform=st.sampled_from([0.0, 0.3, 1 - 2**-53]))
def test_a_draw_never_leaves_the_filtered_tokens(
    rows: list[list[float]], k: int, uniform: float
) -> None:
    logits = truncated(torch.tensor(rows), k, None)
    tokens = draw(logits, torch.full((len(rows),), uniform, dtype=torch.float64))
    assert all(token in row for token, row in zip(tokens.tolist(), kept(logits), strict=True))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 9},
        {"top_p": 0.7},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_have_the_frequencies_of_the_truncated_softmax(
    knobs: dict[str, Any], dtype: torch.dtype
) -> None:
    """Pearson's chi-square of 10^5 draws; the seed is fixed, and so is the answer."""
    count, codes = 100_000, 40
    logits = torch.randn(codes, generator=torch.Generator().manual_seed(0)).mul(0.8).to(dtype)
    sampling = Sampling(**knobs)
    tokens = sampling.choose(logits.expand(count, codes), uniforms(0, [3], count, CPU)[0])
    row = (logits.double() / sampling.temperature).tolist()
    members = obvious_top_k(row, sampling.top_k or codes)
    members = sorted(obvious_top_p(row, sampling.top_p or 1.0, members))
    found, wanted = tokens.bincount(minlength=codes), torch.zeros(codes, dtype=torch.float64)
    wanted[members] = torch.tensor(row, dtype=torch.float64)[members].softmax(0) * count
    assert found[wanted == 0].sum() == 0
    assert wanted[members].min() > 5
    chi_square = ((found - wanted)[members].square() / wanted[members]).sum().item()
    freedom = len(members) - 1
    # the 99.9 % quantile by Wilson and Hilferty
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < quantile


def test_many_rows_are_chosen_in_parts_as_they_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    drawn, choose = uniforms(0, [0], 50, CPU)[0], Sampling(0.9, 7, 0.9).choose
    at_once = choose(logits, drawn)
    for most in (1, 30, 70, 10_000):
        monkeypatch.setattr(sampling_module, "LOGITS", most)
        assert torch.equal(choose(logits, drawn), at_once)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    chosen = Sampling(temperature=0).choose(logits, torch.tensor([0.99, 0.99]))
    assert chosen.tolist() == [1, 0]


def test_a_temperature_too_low_to_divide_by_takes_the_likeliest_code() -> None:
    logits = torch.tensor([[1e30, 3e30, -1e30], [2.0, 0.0, 1.0]])
    for temperature in (5e-324, 1e-199):
        chosen = Sampling(temperature=temperature).choose(logits, torch.tensor([0.99, 0.99]))
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
        ({"guidance_schedule": "sine"}, "guidance_schedule=sine: use constant or linear or cosine"),
        ({"guidance_power": 0.0}, "guidance_power=0.0"),
        ({"guidance": 1e38}, r"guidance=1e\+38: use a number from 0 to 1000000"),
        (
            {"choice_temperature": 1e38},
            r"choice_temperature=1e\+38: use a number from 0 to 1000000",
        ),
    ],
)
def test_knobs_outside_their_range_are_refused(knobs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**knobs)
