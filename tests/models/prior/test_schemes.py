"""Schemes: what is learned of tokens and how they are generated, for the next index and for a
masked scheme that reads both ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from taming_dist.losses.tokens import corrupt, token_nll
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import SCHEMES, Choose, Network, NextIndex, Pair, Scheme
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

TOKENS = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(1))


@dataclass
class Masked(Scheme):
    """Every second token is told from the others."""

    name: str = "masked"
    causal: ClassVar[bool] = False
    shift: ClassVar[int] = 0
    extra_tokens: ClassVar[int] = 1

    def training_pair(self, tokens: Tensor, draws: Mapping[str, Tensor], vocabulary: int) -> Pair:
        return self.evaluation_pair(tokens, vocabulary)

    def evaluation_pair(self, tokens: Tensor, vocabulary: int) -> Pair:
        mask = (torch.arange(tokens.shape[1], device=tokens.device) % 2 == 0).expand_as(tokens)
        return Pair(tokens.masked_fill(mask, vocabulary), tokens, mask)

    def uniforms(self, count: int) -> int:
        return 2 * count

    def generate(
        self, network: Network, prefix: Prefix, count: int, choose: Choose, uniforms: Tensor
    ) -> Tensor:
        tokens = torch.zeros(len(prefix), count, dtype=torch.int64)
        for step in range(2):
            logits = network(tokens, prefix)
            drawn = uniforms[:, step * count :]
            tokens = torch.stack([choose(logits[:, k], drawn[:, k]) for k in range(count)], 1)
        return tokens


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setitem(SCHEMES, "masked", Masked)
    torch.manual_seed(0)
    config = TransformerConfig(24, [3, 4], layers=2, heads=2, width=16, scheme="masked")
    return Transformer(config).eval()


def test_without_noise_the_next_index_reads_what_it_is_to_say() -> None:
    scheme = NextIndex()
    assert scheme.draw((3, 12), 24, torch.Generator()) == {}
    pair = scheme.training_pair(TOKENS, {}, 24)
    assert pair.inputs is pair.targets is TOKENS
    assert pair.mask is None


def test_with_pkeep_only_what_is_read_becomes_noise_and_only_in_training() -> None:
    scheme = NextIndex(pkeep=0.5)
    draws = scheme.draw((3, 12), 24, torch.Generator().manual_seed(3))
    pair = scheme.training_pair(TOKENS, draws, 24)
    assert torch.equal(pair.inputs, corrupt(TOKENS, 0.5, draws["chance"], draws["noise"]))
    assert not torch.equal(pair.inputs, TOKENS)
    assert torch.equal(pair.targets, TOKENS)
    assert torch.equal(scheme.evaluation_pair(TOKENS, 24).inputs, TOKENS)
    with pytest.raises(Exception, match=r"model\.scheme\.pkeep=0"):
        NextIndex(pkeep=0.0)


def test_the_next_index_is_generated_one_token_after_the_other() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(24, [3, 4], layers=2, heads=2, width=16)).eval()
    prefix = model.condition.prefix(2, {})
    likeliest = lambda logits, uniforms: logits.argmax(-1)  # noqa: E731
    with torch.no_grad():
        found = model.scheme.generate(model, prefix, 12, likeliest, torch.zeros(2, 12))
        expected = torch.zeros(2, 12, dtype=torch.int64)
        for k in range(12):  # the whole sequence anew for each token
            expected[:, k] = model(expected, prefix)[:, k].argmax(-1)
    assert torch.equal(found, expected)


def test_a_scheme_that_reads_both_ways_has_a_position_and_a_logit_for_each_token(
    masked: Transformer,
) -> None:
    assert (masked.config.positions, masked.tok_emb.num_embeddings) == (13, 25)
    pair = masked.scheme.evaluation_pair(TOKENS, 24)
    prefix = masked.condition.prefix(3, {})
    logits = masked(pair.inputs, prefix)
    assert logits.shape == (3, 12, 24)
    changed = pair.inputs.clone()
    changed[:, -1] += 1
    assert (masked(changed, prefix)[:, 0] - logits[:, 0]).abs().max() > 1e-6  # sees what is later
    loss = token_nll(logits, pair.targets, pair.mask)
    every_second = token_nll(logits[:, ::2], TOKENS[:, ::2])
    assert loss.item() == pytest.approx(every_second.item(), rel=1e-6)
