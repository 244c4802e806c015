"""Metrics of a token model against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.evaluation.tokens import TokenMetrics, token_metrics
from taming_dist.models.prior.head import Judged
from taming_dist.models.prior.transformer import TransformerConfig

LOGITS, CODES = torch.randn(5, 3, 7), torch.randint(0, 7, (5, 3))


def judged(logits: Tensor, codes: Tensor) -> Judged:
    nll = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    return Judged(nll, logits.argmax(-1) == codes)


def fed(*parts: tuple[Tensor, ...], **given: object) -> TokenMetrics:
    found = TokenMetrics(7, 3, **given)  # type: ignore[arg-type]
    for logits, codes, *weights in parts:
        found.update(judged(logits, codes), codes, *weights)
    return found


def test_metrics_weigh_every_token_the_same_whatever_the_batches() -> None:
    log_p = LOGITS.log_softmax(-1).gather(-1, CODES[..., None]).squeeze(-1)
    frequencies = CODES.flatten().bincount(minlength=7).double() / CODES.numel()
    found = fed((LOGITS[:4], CODES[:4]), (LOGITS[4:], CODES[4:]), dimensions=48).compute()
    assert found.pop("val_nll_by_position") == pytest.approx((-log_p.mean(0)).tolist(), abs=1e-5)
    assert found == pytest.approx(
        {
            "val_nll": float(-log_p.mean()),
            "val_accuracy": float((LOGITS.argmax(-1) == CODES).double().mean()),
            "unigram_entropy": float(torch.special.entr(frequencies).sum()),
            "val_bits_per_dim": float(-log_p.sum(1).mean()) / math.log(2) / 48,
        },
        rel=1e-5,
    )


def test_only_tokens_of_the_mask_count() -> None:
    mask = torch.tensor([[True, False, False]]).expand(5, -1)
    found = fed((LOGITS, CODES, mask), measure="some_nll").compute()
    first = fed((LOGITS[:, :1].expand(-1, 3, -1), CODES[:, :1].expand(-1, 3))).compute()
    assert found["val_some_nll"] == pytest.approx(first["val_nll"])
    assert found["val_accuracy"] == pytest.approx(first["val_accuracy"])
    by_position = found["val_some_nll_by_position"]
    assert isinstance(by_position, list)
    assert [math.isnan(value) for value in by_position] == [False, True, True]


def test_a_model_that_knows_only_the_frequencies_reaches_the_unigram_entropy() -> None:
    codes = torch.tensor([[0, 0, 0, 1]])
    logits = torch.tensor([3 / 4, 1 / 4]).log().expand(1, 4, 2)
    metrics = TokenMetrics(2, 4)
    metrics.update(judged(logits, codes), codes)
    found = metrics.compute()
    assert found["val_nll"] == pytest.approx(found["unigram_entropy"])
    assert found["val_nll"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_sums_of_ranks_add_up() -> None:
    alone, first, second = (fed((LOGITS[k], CODES[k])) for k in (slice(5), slice(1), slice(1, 5)))
    first.sums += second.sums
    assert first.compute()["val_nll"] == pytest.approx(alone.compute()["val_nll"], rel=1e-6)
    assert first.compute()["val_accuracy"] == alone.compute()["val_accuracy"]


def test_bits_per_dim_are_left_out_where_the_size_of_the_images_is_not_known() -> None:
    gpt = TransformerConfig(7, [2, 2], layers=1, heads=1, width=8, condition="none")
    assert token_metrics(gpt, 16).dimensions == 3 * 16 * 16
    assert token_metrics(gpt, None).dimensions is None
