"""The head: a loss that keeps no logits from large vocabularies on, and is the same."""

import pytest
import torch
from torch import Tensor

from taming_dist.models.prior import head as module
from taming_dist.models.prior.head import LARGE_VOCABULARY, Head


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
