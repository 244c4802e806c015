"""The head: a loss that keeps no logits from large vocabularies on, and is the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taming_dist.models.prior import head as module
from taming_dist.models.prior.head import LARGE_VOCABULARY, Head


class Largest(TorchDispatchMode):
    """Notes how many numbers the results of operations have."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.append(out.numel())
        return out


def loss_and_gradients(head: Head, autocast: bool) -> tuple[Tensor, list[Tensor], int]:
    """The weighted loss of some rows, its gradients, and the most numbers of a tensor kept for
    them."""
    randomness = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, generator=randomness).requires_grad_()
    targets = torch.randint(head.out_features, (2, 5), generator=randomness)
    weights = torch.rand(2, 5, generator=randomness)
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nll = head(x, targets)
        loss = (nll * weights).sum()
    loss.backward()
    return nll, [x.grad, head.weight.grad], max(kept)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_vocabulary_keeps_no_logits_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    """Three rows at once, which do not divide ten."""
    monkeypatch.setattr(module, "LOGITS", 3 * LARGE_VOCABULARY)
    torch.manual_seed(0)
    head = Head(4, LARGE_VOCABULARY)
    nll, gradients, kept = loss_and_gradients(head, autocast)
    assert nll.dtype == torch.float32
    assert kept <= head.weight.numel()
    head.zero_grad()
    monkeypatch.setattr(module, "LARGE_VOCABULARY", LARGE_VOCABULARY + 1)
    plain, expected, all_logits = loss_and_gradients(head, autocast)
    assert all_logits == 10 * LARGE_VOCABULARY
    assert torch.allclose(nll, plain, atol=1e-6)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-2 if autocast else 1e-6)


@pytest.mark.parametrize("vocabulary", [7, LARGE_VOCABULARY])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_evaluation_judges_tokens_without_all_logits_as_with_them(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, autocast: bool
) -> None:
    monkeypatch.setattr(module, "LOGITS", 3 * vocabulary)  # three rows at once, of ten
    randomness = torch.Generator().manual_seed(0)
    head, x = Head(4, vocabulary), torch.randn(2, 5, 4, generator=randomness)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = head(x)
        targets = logits.argmax(-1)
        targets[0] = torch.randint(vocabulary, (5,), generator=randomness)
        seen: list[int] = []
        with Largest(seen):
            nll, hits = head(x, targets, hits=True)
    expected = -logits.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert torch.allclose(nll, expected, atol=1e-5)
    assert torch.equal(hits, logits.argmax(-1) == targets)
    assert max(seen) <= max(3 * vocabulary, head.weight.numel(), x.numel())
