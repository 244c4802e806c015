"""Index backpropagation in blocks against the whole matrix written out."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from taming_dist.models.quantizers import IndexQuantizer, IndexQuantizerConfig, interface


def made() -> IndexQuantizer:
    config = IndexQuantizerConfig(
        codes=11, dim=4, beta=0.3, entropy_weight=0.7, diversity=1.4, temperature=0.5
    )
    quantizer = IndexQuantizer(config)
    with torch.no_grad():
        quantizer.embedding.weight.normal_(generator=torch.Generator().manual_seed(2))
    return quantizer


def latents() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_values_and_both_gradients_equal_the_whole_matrix_written_out(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "SEARCH_BYTES", rows * 4 * 11)
    quantizer, z = made(), latents().requires_grad_(True)
    out = quantizer(z)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    (out.loss + (out.z_q * weights).sum()).backward()

    twin, entries = latents().requires_grad_(True), made().embedding.weight
    flat = twin.permute(0, 2, 3, 1).reshape(-1, 4)
    logits = flat @ entries.T
    p = logits.softmax(1)
    hard = torch.nn.functional.one_hot(logits.argmax(1), 11).float()
    z_q = (hard - p.detach() + p) @ entries
    chosen = hard @ entries
    loss = (z_q - flat).square().mean() + (chosen.detach() - flat).square().mean()
    loss = loss + 0.3 * (chosen - flat.detach()).square().mean()
    q = (logits / 0.5).softmax(1)
    mean = q.mean(0)
    loss = loss + 0.7 * (-(q * q.log()).sum(1).mean() + 1.4 * (mean * mean.log()).sum())
    grid = z_q.view(2, 5, 5, 4).permute(0, 3, 1, 2)
    (loss + (grid * weights).sum()).backward()

    assert torch.equal(out.codes.flatten(), logits.argmax(1))
    torch.testing.assert_close(out.z_q, grid)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(z.grad, twin.grad, atol=1e-5, rtol=1e-4)
    found = quantizer.embedding.weight.grad
    torch.testing.assert_close(found, entries.grad, atol=1e-5, rtol=1e-4)


def test_encoding_compares_each_vector_with_each_entry_once() -> None:
    quantizer = made()
    with FlopCounterMode(display=False) as counter:
        quantizer.encode(latents())
    assert counter.get_total_flops() == 2 * (2 * 5 * 5) * 11 * 4


def test_every_entry_gets_a_gradient_at_every_step() -> None:
    quantizer = made()
    out = quantizer(latents()[:1, :, :1, :2])
    out.z_q.sum().backward()
    assert (quantizer.embedding.weight.grad.abs().sum(1) > 0).all()


def test_blocks_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "SEARCH_BYTES", 5 * 4 * 11)
    kept: list[int] = []

    def packing(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(packing, lambda tensor: tensor):
        made()(latents().requires_grad_(True))
    assert max(kept) < 50 * 11


GROWTH = """
import resource
import torch
from taming_dist.memory import keep_freed_memory
from taming_dist.models.quantizers import IndexQuantizer, IndexQuantizerConfig, interface

keep_freed_memory()
interface.SEARCH_BYTES = 4 << 20
quantizer = IndexQuantizer(IndexQuantizerConfig(codes=2**14, dim=4))
z = torch.randn(32, 4, 8, 8, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = quantizer(z)
(out.loss + out.z_q.sum()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_no_block_leaves_memory_behind_also_where_freed_memory_is_kept() -> None:
    """The whole matrix would be 128 MiB, and 32 blocks of it have several copies."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 48 * 1024


def test_every_code_is_chosen_by_a_latent_along_it() -> None:
    quantizer = made().eval()
    unit = torch.nn.functional.normalize(quantizer.embedding.weight.detach(), dim=1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(unit)
    codes = torch.arange(11)[None, None]
    assert torch.equal(quantizer(quantizer.lookup(codes)).codes, codes)
