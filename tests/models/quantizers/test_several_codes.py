"""Quantizers with several codes at a place, product and residual, against slow loops."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.quantizers import (
    ProductQuantizerConfig,
    ResidualQuantizerConfig,
    build_quantizer,
    keep_used,
)


def numbers(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def product(**settings: Any) -> Any:
    torch.manual_seed(0)
    return build_quantizer(ProductQuantizerConfig(codes=15, dim=6, tables=3, **settings))


def residual(**settings: Any) -> Any:
    torch.manual_seed(0)
    usual = {"codes": 11, "depth": 3, "initial": "random"}
    return build_quantizer(ResidualQuantizerConfig(**{**usual, "dim": 4, **settings}))


def nearest_of(vector: Tensor, entries: Tensor) -> int:
    apart = [float((vector - entry).detach().square().sum()) for entry in entries]
    return apart.index(min(apart))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_products_codes_loss_and_gradients_are_those_of_a_table_for_each_part(
    normalized: bool,
) -> None:
    quantizer = product(beta=0.3, normalized=normalized)
    z = numbers(2, 6, 3, 4).requires_grad_(True)
    upstream = numbers(2, 6, 3, 4, seed=2)
    out = quantizer(z)
    (out.loss + (out.z_q * upstream).sum()).backward()

    weight = quantizer.embedding.weight.detach().clone().requires_grad_(True)
    again = z.detach().clone().requires_grad_(True)
    entries = F.normalize(weight, dim=-1) if normalized else weight
    total, codes, chosen = torch.zeros(()), torch.zeros(2, 3, 3, 4), torch.zeros(2, 6, 3, 4)
    for b, i, j, table in torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 3))).tolist():
        part = slice(2 * table, 2 * table + 2)
        vector = again[b, part, i, j]
        vector = F.normalize(vector, dim=0) if normalized else vector
        code = 5 * table + nearest_of(vector, entries[5 * table : 5 * table + 5])
        codes[b, table, i, j] = code
        chosen[b, part, i, j] = entries[code].detach()
        apart = (entries[code] - vector.detach()).square().sum()
        close = (entries[code].detach() - vector).square().sum()
        total = total + (apart + 0.3 * close) / z.numel()
        total = total + (vector * upstream[b, part, i, j]).sum()  # straight through
    total.backward()
    assert torch.equal(out.codes, codes.long())
    torch.testing.assert_close(out.z_q, chosen)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, again.grad)
    torch.testing.assert_close(quantizer.embedding.weight.grad, weight.grad)


def test_a_product_counts_the_use_of_each_table() -> None:
    quantizer = product()
    counts = quantizer(numbers(2, 6, 3, 4)).statistics.counts.view(3, 5)
    assert counts.sum(1).tolist() == [24, 24, 24]


def test_dead_codes_of_a_table_take_the_place_of_its_part_of_latents() -> None:
    quantizer = product(initial="data", revive_below=0.9)
    z, seen = numbers(2, 6, 3, 4), []
    parts = F.normalize(z.unflatten(1, (3, 2)).permute(2, 1, 0, 3, 4).flatten(2), dim=0)

    def replace_rows(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        seen.append(rows)
        parameter.data[rows] = values[rows]

    for step in range(20):  # set from the data, then restarted when some have been used less
        statistics = quantizer(z).statistics
        randomness = torch.Generator().manual_seed(step)
        found = quantizer.update(statistics, randomness, replace_rows)
        tables = quantizer.embedding.weight.view(3, 5, 2)
        for code in seen[-1].nonzero().flatten().tolist():
            entry, of_table = tables[code // 5, code % 5], parts[:, code // 5]
            assert bool((of_table - entry[:, None]).abs().amax(0).min() < 1e-6)
        assert int(found) == (int(seen[-1].sum()) if step else 0)
    assert seen[0].all()
    assert any(rows.any() for rows in seen[1:])


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_each_residual_level_quantizes_what_is_left(gradient: str) -> None:
    quantizer = residual(beta=0.3, gradient=gradient)
    z = numbers(2, 4, 3, 4).requires_grad_(True)
    out = quantizer(z)
    out.loss.backward()
    again = z.detach().clone().requires_grad_(True)
    codes, total, made = torch.zeros(2, 3, 3, 4), torch.zeros(()), torch.zeros(2, 4, 3, 4)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        vector, summed = again[b, :, i, j], torch.zeros(4)
        for level in range(3):
            code = nearest_of(vector - summed, quantizer.entries)
            codes[b, level, i, j] = code
            summed = summed + quantizer.entries[code]
            total = total + 0.3 * (vector - summed).square().sum() / z.numel()
        made[b, :, i, j] = summed
    total.backward()
    assert torch.equal(out.codes, codes.long())
    torch.testing.assert_close(out.z_q, made)
    torch.testing.assert_close(out.loss, total.detach())
    assert z.grad is not None
    torch.testing.assert_close(z.grad, again.grad)
    torch.testing.assert_close(quantizer.lookup(out.codes), made)


def test_the_shared_codebook_follows_the_mean_of_what_its_codes_were_chosen_for() -> None:
    quantizer = residual(decay=0.8, revive_below=0.0)
    z = numbers(2, 4, 3, 4)
    sizes, sums = quantizer.cluster_size.clone(), quantizer.cluster_sum.clone()
    chosen_for: list[list[Tensor]] = [[] for _ in range(11)]
    for vector in z.movedim(1, -1).flatten(0, 2):
        left = vector
        for _ in range(3):
            code = nearest_of(left, quantizer.entries)
            chosen_for[code].append(left)
            left = left - quantizer.entries[code]
    statistics = quantizer(z).statistics
    assert statistics.counts.tolist() == [len(vectors) for vectors in chosen_for]
    quantizer.update(statistics, torch.Generator(), lambda *_: None)
    for code, vectors in enumerate(chosen_for):
        size = 0.8 * sizes[code] + 0.2 * len(vectors)
        mean = (0.8 * sums[code] + 0.2 * sum(vectors, torch.zeros(4))) / size
        torch.testing.assert_close(quantizer.entries[code], mean, atol=1e-5, rtol=1e-4)


def test_a_codebook_set_from_data_quantizes_better_with_each_level() -> None:
    quantizer = residual(codes=24, initial="kmeans")
    z = numbers(8, 4, 4, 4)
    statistics = quantizer(z).statistics
    assert statistics.candidates is not None
    assert statistics.candidates.shape == (8, 16, 4)  # latents alone, until it is set
    quantizer.update(statistics, torch.Generator().manual_seed(0), lambda *_: None)
    out = quantizer(z)
    levels = F.embedding(out.codes, quantizer.entries).cumsum(1)
    errors = [float((z.movedim(1, -1) - levels[:, k]).square().mean()) for k in range(3)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]
    assert out.statistics.candidates.shape == (8, 3 * 4, 4)  # what was left at each level, too


def test_restarts_of_a_residual_codebook_are_offered_what_is_left_at_each_level() -> None:
    quantizer = residual(revive_below=0.9)
    z = numbers(1, 4, 2, 2)
    pool = quantizer(z).statistics.candidates[0]
    left = z[0].flatten(1).T
    for level in range(3):
        assert torch.allclose(pool[4 * level : 4 * level + 4], left)
        left = left - quantizer.entries[[nearest_of(each, quantizer.entries) for each in left]]


def test_codes_of_a_residual_codebook_can_be_left_out_and_those_of_tables_cannot() -> None:
    used = torch.tensor([1, 4])
    config = ResidualQuantizerConfig(codes=11, dim=4, depth=3)
    kept = keep_used(config, residual().state_dict(), used)
    assert (kept[0].codes, kept[0].depth) == (2, 3)
    assert torch.equal(kept[1]["entries"], residual().entries[used])
    with pytest.raises(UserError, match="name=product: its tables have equally many codes, none"):
        keep_used(ProductQuantizerConfig(codes=15, dim=6, tables=3), product().state_dict(), used)


def test_more_levels_than_a_step_can_go_through_are_refused() -> None:
    with pytest.raises(UserError, match=r"depth=9223372036854775807: use a whole number from 2 to"):
        ResidualQuantizerConfig(codes=11, dim=4, depth=2**63 - 1)
