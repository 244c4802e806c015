"""The codebook learned by gradient against brute force and the original's values and gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.models.quantizers import (
    Statistics,
    VectorQuantizer,
    VectorQuantizerConfig,
    interface,
    nearest,
)
from taming_dist.training.metrics import CodeUsage

GOLDEN = Path(__file__).parents[2] / "golden" / "vqgan_quantizers.pt"


def randomness(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(b: int = 3, d: int = 4, side: int = 5) -> Tensor:
    return torch.randn(b, d, side, side, generator=randomness(1))


def replace_rows(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
    parameter.data[rows] = values[rows]


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_nearest_equals_brute_force_for_any_block_size(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(64, 5, generator=randomness())
    entries = torch.randn(17, 5, generator=randomness(1))
    monkeypatch.setattr(interface, "SEARCH_BYTES", rows * 4 * len(entries))
    slow = [min(range(17), key=lambda k: float((v - entries[k]).square().sum())) for v in z]
    assert nearest(z, entries).tolist() == slow


def test_ties_go_to_the_lowest_index() -> None:
    entries = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), entries).tolist() == [1, 1]


@pytest.mark.parametrize("variant", ["vq1", "vq2", "vq2_new"])
def test_it_equals_the_original_with_both_gradients(variant: str) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    expected = golden[variant]
    config = VectorQuantizerConfig(codes=32, dim=16, legacy=variant != "vq2_new")
    quantizer = VectorQuantizer(config)
    quantizer.load_state_dict(expected["state"])
    z = golden["z"].clone().requires_grad_(True)
    out = quantizer(z)
    (out.loss + 0.1 * out.z_q.sum()).backward()  # as recorded
    assert torch.equal(out.codes.flatten(), expected["indices"].flatten())
    torch.testing.assert_close(out.z_q, expected["zq"])
    torch.testing.assert_close(out.loss, expected["loss"])
    torch.testing.assert_close(z.grad, expected["grad_z"])
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected["grad_codebook"])


def test_the_logged_perplexity_is_the_originals() -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=32, dim=16))
    quantizer.load_state_dict(golden["vq1"]["state"])
    usage = CodeUsage()
    usage.add(quantizer(golden["z"]).statistics.counts)
    assert float(usage.take()["codebook_perplexity"]) == pytest.approx(
        float(golden["vq1"]["perplexity"]), rel=1e-5
    )


@pytest.mark.parametrize("normalized", [True, False])
def test_the_straight_through_gradient_is_the_identity(normalized: bool) -> None:
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=12, dim=4, normalized=normalized))
    z = latents().requires_grad_(True)
    weights = torch.randn(z.shape, generator=randomness(3))
    (quantizer(z).z_q * weights).sum().backward()
    twin = latents().requires_grad_(True)
    through = F.normalize(twin, dim=1) if normalized else twin
    (through * weights).sum().backward()
    torch.testing.assert_close(z.grad, twin.grad)


def test_normalized_entries_start_with_unit_length() -> None:
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=12, dim=4, normalized=True))
    torch.testing.assert_close(quantizer.embedding.weight.norm(dim=1), torch.ones(12))


def test_without_restarts_there_is_nothing_but_the_codebook() -> None:
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=12, dim=4))
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    statistics = quantizer(latents()).statistics
    assert statistics.candidates is None
    assert quantizer.update(statistics, randomness(), replace_rows) == 0


def test_dead_codes_take_the_place_of_latents_and_are_left_alone_for_a_while() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=12, dim=4, revive_below=0.2))
    replaced: list[Tensor] = []

    def recording(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        assert parameter is quantizer.embedding.weight
        if rows.any():
            replaced.append(rows)
        replace_rows(parameter, rows, values)

    z = 4 + 0.1 * latents(b=6)
    with torch.no_grad():
        quantizer.embedding.weight[0] = 4
    found = 0
    for step in range(200):
        out = quantizer(z)
        before = quantizer.embedding.weight.detach().clone()
        found += quantizer.update(out.statistics, randomness(step), recording)
        if replaced:
            break
        assert torch.equal(before, quantizer.embedding.weight)
    assert found == replaced[0].sum() == 11  # all but the one in use, 11 of the 24 offered latents
    offered = out.statistics.candidates.flatten(0, 1)
    for row in quantizer.embedding.weight.detach()[replaced[0]]:
        assert (offered == row).all(1).any()
    assert quantizer.update(quantizer(z).statistics, randomness(), recording) == 0


@pytest.mark.parametrize("initial", ["data", "kmeans"])
def test_the_first_update_sets_the_codebook_and_a_reload_remembers_it(initial: str) -> None:
    torch.manual_seed(0)
    config = VectorQuantizerConfig(codes=6, dim=4, initial=initial)
    quantizer = VectorQuantizer(config)
    before = quantizer(latents())
    assert before.statistics.candidates.shape == (3, 25, 4)
    quantizer.update(before.statistics, randomness(), replace_rows)
    after = quantizer(latents())
    assert after.statistics.candidates is None
    assert after.loss.item() < 0.8 * before.loss.item()
    again = VectorQuantizer(config)
    again.load_state_dict(quantizer.state_dict())
    assert again(latents()).statistics.candidates is None


def test_statistics_of_evaluation_never_set_the_codebook() -> None:
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=6, dim=4, initial="data")).eval()
    weight = quantizer.embedding.weight.detach().clone()
    quantizer.update(quantizer(latents()).statistics, randomness(), replace_rows)
    assert torch.equal(quantizer.embedding.weight, weight)
    assert isinstance(quantizer(latents()).statistics, Statistics)
