"""Sampling on a GPU: the recorded step writes what the plain one writes, and asks nothing of the
host; draws have the CPU's bits. On the CPU the step runs as it is."""

from pathlib import Path

import pytest
import torch

from taming_dist.generation.captured import Captured
from taming_dist.generation.draws import uniforms
from taming_dist.generation.precision import in_bf16
from taming_dist.generation.sampler import Sampler
from taming_dist.generation.sampling import Sampling
from tests.gpu.conftest import finish, start
from tests.gpu.samplers import GUIDED, PLAIN, classes, small
from tests.gpu.waits import no_waiting

SAMPLINGS = pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided"])
BLOCKS = pytest.mark.parametrize("block", ["gpt", "llama", "rar"])


@BLOCKS
@SAMPLINGS
@torch.no_grad()
def test_the_recorded_step_writes_what_the_plain_one_writes(
    device: str, block: str, sampling: Sampling
) -> None:
    model = small(block, device)
    plain, recorded = Sampler(model, sampling), Sampler(model, sampling, Captured())
    for images in (range(8), range(8, 13), range(1)):
        prefix = classes(len(images), device)
        expected = plain.codes(prefix, 3, images)
        assert torch.equal(recorded.codes(prefix, 3, images), expected)


def test_a_compiled_step_writes_the_same(device: str, tmp_path: Path) -> None:
    """In a process of its own: what checks shapes in tests cannot be compiled."""
    script = Path(__file__).with_name("samplers.py")
    output = finish(start([str(script), device], device, tmp_path), 300)
    assert float(output.split()[-1]) > 0.9  # fused kernels round in other places


@SAMPLINGS
@torch.no_grad()
def test_the_host_never_waits_once_the_step_is_recorded(device: str, sampling: Sampling) -> None:
    model = in_bf16(small("rar", device))
    sampler = Sampler(model, sampling, Captured())
    prefix = classes(8, device)
    expected = sampler.codes(prefix, 3, range(8))
    with no_waiting(torch.device(device)):
        again = sampler.codes(prefix, 3, range(8))
    assert torch.equal(again, expected)


@torch.no_grad()
def test_the_masked_scheme_never_has_the_host_wait(device: str) -> None:
    model = small("gpt", device, scheme="masked")
    sampler, prefix = Sampler(model, GUIDED), classes(8, device)
    expected = sampler.codes(prefix, 3, range(8))
    with no_waiting(torch.device(device)):
        again = sampler.codes(prefix, 3, range(8))
    assert torch.equal(again, expected)


def test_draws_have_the_same_bits_everywhere(device: str) -> None:
    there, here = (uniforms(5, range(50), 40, torch.device(name)) for name in (device, "cpu"))
    assert torch.equal(there.cpu(), here)


def test_draws_from_a_distribution_are_those_of_the_cpu(device: str) -> None:
    logits = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    drawn = uniforms(0, [0], 2000, torch.device("cpu"))[0]
    for sampling in (PLAIN, Sampling(1.3), Sampling(top_p=0.7)):
        there = sampling.choose(logits.to(device), drawn.to(device))
        assert (there.cpu() == sampling.choose(logits, drawn)).float().mean() > 0.999
