"""What is optimised: it begins as the codes that are given, and draws entries alone."""

import pytest
import torch

from taming_dist.guiding.variables import VARIABLES, Codebook, Codes, Latents
from taming_dist.models.quantizers import (
    BSQuantizerConfig,
    FSQuantizerConfig,
    GumbelQuantizerConfig,
    LFQuantizerConfig,
    VectorQuantizerConfig,
    build_quantizer,
)
from taming_dist.models.quantizers.interface import QuantizerConfig

CPU = torch.device("cpu")
CONFIGS: list[QuantizerConfig] = [
    VectorQuantizerConfig(codes=16, dim=4),
    VectorQuantizerConfig(codes=16, dim=4, normalized=True),
    GumbelQuantizerConfig(codes=16, dim=4),
    FSQuantizerConfig(levels=[4, 3, 5]),
    LFQuantizerConfig(bits=4),
    BSQuantizerConfig(bits=4),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_of_any_quantizer_it_begins_as_given_and_draws_entries_with_a_gradient(
    config: QuantizerConfig, name: str
) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(config).eval().requires_grad_(False)
    book = Codebook.of(quantizer, CPU)
    codes = torch.randint(config.codes, (3, 5), generator=generator())
    variable = VARIABLES[name](book, codes)
    assert variable.codes().equal(codes)
    entries = variable.draw(1.0, generator())
    assert entries.shape == (1, config.dim, 3, 5)
    rows = entries.detach()[0].flatten(1).T
    assert (torch.cdist(rows, book.entries).amin(1) < 1e-4).all()
    entries.square().sum().backward()
    assert variable.parameter.grad is not None
    assert variable.parameter.grad.abs().max() > 0
    variable.bound()
    assert variable.codes().equal(codes)


def test_the_gradient_at_the_entries_is_that_of_the_latents() -> None:
    book = Codebook(torch.tensor([[0.0, 0.0], [4.0, 2.0]]))
    latents = Latents(book, torch.tensor([[0, 1, 1]]))
    with torch.no_grad():
        latents.parameter.mul_(0.9)  # off the entries
    weights = torch.arange(6.0).view(1, 2, 1, 3)
    entries = latents.draw(1.0, generator())
    torch.testing.assert_close(entries[0, :, 0].T, book.entries[[0, 1, 1]])
    (entries * weights).sum().backward()
    expected = weights[0, :, 0].T * book.scale  # of the units in which they are optimised
    torch.testing.assert_close(latents.parameter.grad, expected)


def test_latents_stay_within_the_entries() -> None:
    book = Codebook(torch.tensor([[-1.0, 0.0], [2.0, 5.0]]))
    latents = Latents(book, torch.tensor([[0, 1]]))
    with torch.no_grad():
        latents.parameter.copy_(torch.tensor([[-99.0, 99.0], [99.0, -99.0]]))
    latents.bound()
    found = latents.parameter.detach() * book.scale
    torch.testing.assert_close(found, torch.tensor([[-1.0, 5.0], [2.0, 0.0]]))


def test_a_place_begins_with_its_code_half_of_the_time_and_settles_as_it_cools() -> None:
    book = Codebook(torch.randn(64, 3, generator=generator()))
    codes = Codes(book, torch.full((50, 40), 7))
    at_first = codes.draw(1.0, generator())
    same = (at_first[0] - book.entries[7][:, None, None]).abs().amax(0) < 1e-5
    assert same.float().mean() == pytest.approx(0.5, abs=0.05)
    # the entry that is drawn does not depend on the temperature, but its gradient does
    torch.testing.assert_close(codes.draw(0.1, generator()), at_first)


def test_the_pull_is_the_square_of_the_distance_from_the_start() -> None:
    book = Codebook(torch.tensor([[-1.0], [1.0], [3.0]]))
    latents = Latents(book, torch.tensor([[0, 2]]))
    assert latents.pull().item() == 0
    with torch.no_grad():
        latents.parameter[0] += 3.0
    assert latents.pull().item() == pytest.approx(9 / 2)
