"""The recorded step: what it writes equals the plain step, and it is kept. Here it is run as it is;
tests/gpu has it in CUDA graphs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.generation.captured import Captured
from taming_dist.generation.completion import Known
from taming_dist.generation.sampler import Sampler
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.blocks import (
    GPTBlockConfig,
    LlamaBlockConfig,
    RARBlockConfig,
    StaticCache,
)
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from tests.engine.waiting import Waiting

BLOCKS = {
    "gpt": GPTBlockConfig(),
    "gpt, some unmasked": GPTBlockConfig(unmasked=6),
    "llama": LlamaBlockConfig(),
    "llama, adaptive": LlamaBlockConfig(adaptive=True),
    "rar": RARBlockConfig(),
}
SAMPLING = Sampling(0.9, 10, 0.95)
GUIDED = Sampling(0.9, 10, guidance=2.0, guidance_schedule="cosine")


def tiny(block: str, order: str = "raster") -> Transformer:
    """A transformer with logits far from flat, so that a wrong position shows."""
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "condition_table": "own"}
    condition = CodesCondition(7, [1, 3])
    model = Transformer(
        TransformerConfig(
            24,
            [3, 4],
            condition=condition,
            block=BLOCKS[block],
            order=order,
            null_prefix=True,
            **sizes,
        )
    )
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=randomness) * 0.3)
    return model.eval()


def prefixes(count: int) -> Prefix:
    return Prefix((torch.arange(count * 3).view(count, 3) % 7,))


def known_codes(count: int, share: float) -> Known:
    randomness = torch.Generator().manual_seed(5)
    mask = torch.rand(count, 3, 4, generator=randomness) < share
    return Known(torch.randint(24, (count, 3, 4), generator=randomness), mask)


@settings(max_examples=12, deadline=None)
@given(
    block=st.sampled_from(sorted(BLOCKS)),
    order=st.sampled_from(["raster", "random", "rar"]),
    guided=st.booleans(),
    batches=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.4]),
)
@torch.no_grad()
def test_it_writes_what_the_plain_step_writes(
    block: str, order: str, guided: bool, batches: list[int], share: float
) -> None:
    """Batches of any sizes one after the other, by the same recorded steps."""
    model, sampling = tiny(block, order), GUIDED if guided else SAMPLING
    plain, static = Sampler(model, sampling), Sampler(model, sampling, Captured())
    for first, count in enumerate(batches):
        images, known = range(first, first + count), known_codes(count, share)
        expected = plain.codes(prefixes(count), 3, images, known)
        assert torch.equal(static.codes(prefixes(count), 3, images, known), expected)


@torch.no_grad()
def test_a_step_is_recorded_once_and_smaller_batches_are_filled_up_to_it() -> None:
    model, captured = tiny("rar"), Captured()
    sampler = Sampler(model, SAMPLING, captured)
    first = sampler.codes(prefixes(4), 0, range(4))
    (recorded,) = captured._kept.values()
    addresses = [tensor.data_ptr() for tensor in (*recorded.draft, *recorded.cache.keys)]
    for count in (4, 3, 1):
        found = sampler.codes(prefixes(count), 0, range(count))
        assert torch.equal(found, first[:count])
    assert list(captured._kept.values()) == [recorded]
    again = [tensor.data_ptr() for tensor in (*recorded.draft, *recorded.cache.keys)]
    assert again == addresses
    sampler.codes(prefixes(5), 0, range(5))
    assert len(captured._kept) == 2


@pytest.mark.parametrize("sampling", [SAMPLING, GUIDED], ids=["plain", "guided"])
@torch.no_grad()
def test_the_recorded_step_asks_nothing_of_the_device_and_changes_no_shape(
    sampling: Sampling,
) -> None:
    captured = Captured()
    sampler = Sampler(tiny("llama, adaptive"), sampling, captured)
    sampler.codes(prefixes(2), 0, range(2))
    (recorded,) = captured._kept.values()
    recorded.cache.position.fill_(4)
    recorded.draft.at.fill_(0)
    with Waiting() as waiting:
        shapes = [shapes_of(recorded.step) for _ in range(3)]
    assert waiting.found == []
    assert shapes[0] == shapes[1] == shapes[2]
    assert (int(recorded.cache.position), int(recorded.draft.at)) == (7, 3)


def shapes_of(step: Any) -> list[Any]:
    found: list[Any] = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                found.append((func, result.shape, result.stride(), result.dtype))
            return result

    with Shapes():
        step()
    return found


@torch.no_grad()
def test_what_lies_beyond_the_position_counts_nothing_not_even_if_it_was_never_written() -> None:
    model = tiny("gpt")
    _, begun = model.begin(prefixes(2))
    for keys, values in zip(begun.keys, begun.values, strict=True):
        keys[:, :, 3:] = torch.nan
        values[:, :, 3:] = torch.inf
    tokens, (_, sliced) = torch.tensor([[1], [2]]), model.begin(prefixes(2))
    static = StaticCache(begun)
    found, expected = model.step(tokens, static), model.step(tokens, sliced)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_codes_and_copies_no_layer_of_the_cache() -> None:
    """In a process of its own: the compiler takes no functions whose arguments are checked."""
    command = [sys.executable, str(Path(__file__).with_name("compiled_step.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["compiled"] == found["plain"]
    assert found["longest"] < found["layer"] / 2
