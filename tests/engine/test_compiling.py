"""What torch.compile does, and when: counted, told, and out of reach of signals to the group."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taming_dist.engine.blocks import compile_blocks
from taming_dist.engine.compiling import Recompilations, compilations

BLOCKED = """
import signal
print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
"""

# In a process of its own: in this one the checks of shapes, which torch cannot follow, are on.
PRIOR = """
import copy
import torch
import torch._dynamo.utils
from taming_dist.engine.blocks import compile_network
from taming_dist.engine.compiling import compilations
from taming_dist.models.prior import head
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

head.LARGE_VOCABULARY, head.LOGITS = 24, 24 * 10
sizes = {"layers": 2, "heads": 2, "width": 16, "condition": CodesCondition(7, [2, 2])}
tokens, parts = torch.randint(24, (4, 12)), (torch.randint(7, (4, 4)),)
prefix = Prefix(parts, torch.tensor([True, False, True, False]))
torch.compiler.set_stance(force_backend="eager")
for block in {"name": "gpt", "unmasked": 4}, {"name": "llama", "adaptive": True}:
    torch.manual_seed(0)
    plain = Transformer(TransformerConfig(24, [3, 4], **sizes, block=block, null_prefix=True))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    whole, before = copy.deepcopy(plain), compilations().forward
    assert compile_network(whole, recompute=block["name"] == "llama", in_pieces=False)
    places = plain.places
    expected, found = plain(tokens, prefix, places, tokens), whole(tokens, prefix, places, tokens)
    expected.mean().backward()
    found.mean().backward()
    assert torch.allclose(found, expected, atol=1e-5), block
    for one, other in zip(plain.parameters(), whole.parameters()):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), block
    other = tokens.flip(0)
    whole(other, Prefix(parts, prefix.dropped.flip(0)), places, other)
    with torch.no_grad():
        whole(other[:1], prefix.rows(slice(1)))
    print(block["name"], compilations().forward - before, end=" ")
print(*torch._dynamo.utils.counters["graph_break"])
"""


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Stack(nn.Module):
    block_types = (Double,)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Double() for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def images(count: int) -> Tensor:
    return torch.rand(count, 4, requires_grad=True)


@pytest.fixture(autouse=True)
def without_a_compiler() -> Iterator[None]:
    torch._dynamo.reset()  # forgets who follows what is compiled
    compilations.cache_clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_one_shape_are_compiled_once_and_run_plain_without_gradients(
    recompute: bool,
) -> None:
    network, x = Stack(), images(2)
    plain, before = network(x), compilations().forward
    assert compile_blocks(network, recompute)
    assert torch.equal(network(x), plain)
    assert compilations().forward == before + 1
    with torch.no_grad():
        network.eval()(images(3))
    assert compilations().forward == before + 1


def test_what_is_compiled_after_the_first_step_is_counted_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network, again = Stack(), Recompilations()
    compile_blocks(network, recompute=False)
    network(images(2))
    assert again.take() == 0
    again.step_done()
    network(images(2))
    assert again.take() == 0
    network(images(3))
    assert again.take() == 1
    assert again.take() == 0
    (line,) = (r.getMessage() for r in caplog.records if r.name.startswith("taming_dist"))
    assert "forward (test_compiling.py:" in line
    assert "size mismatch" in line


def test_children_started_while_compiling_do_not_answer_the_signals_of_a_launcher() -> None:
    found = []

    def compiler(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(subprocess.check_output([sys.executable, "-c", BLOCKED], text=True))
        return graph

    def child() -> str:
        return subprocess.check_output([sys.executable, "-c", BLOCKED], text=True)

    compilations()
    before = child()
    with torch.compiler.set_stance("default"):
        torch.compile(lambda x: x + 1, backend=compiler)(torch.rand(2))
    assert set(map(int, found[0].split())) >= {signal.SIGTERM, signal.SIGUSR1}
    assert str(int(signal.SIGINT)) not in found[0].split()
    assert child() == before


@pytest.mark.slow
def test_a_prior_is_compiled_as_a_whole_and_once_without_a_break() -> None:
    """With blocks recomputed or not: the same losses and gradients."""
    command = [sys.executable, "-c", PRIOR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["gpt", "1", "llama", "1"]
