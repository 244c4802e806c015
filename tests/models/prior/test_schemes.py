"""Schemes: what is learned of tokens and how they are generated, for the next index and for the
masked scheme that reads both ways."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.draws import uniforms
from taming_dist.generation.sampling import Sampling
from taming_dist.losses.tokens import corrupt, mean_of
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import SCHEMES, KnownTokens, Masked, NextIndex, Scheme, masked
from taming_dist.models.prior.schemes.masked import EVALUATED, ranks, still_masked
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

CPU = torch.device("cpu")
TOKENS = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(1))


def tiny(scheme: Scheme) -> Transformer:
    """A transformer with logits far from flat."""
    torch.manual_seed(0)
    config = TransformerConfig(24, [3, 4], layers=2, heads=2, width=16, scheme=scheme)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return model


def generated(
    model: Transformer, images: list[int], known: KnownTokens | None = None, **knobs: Any
) -> Tensor:
    drawn = uniforms(0, images, model.scheme.uniforms(12), CPU)
    prefix = model.condition.prefix(len(images), {})
    with torch.no_grad():
        choose = Sampling(**knobs).choose
        return model.scheme.generate(model, prefix, 12, 24, choose, drawn, known)


def one_after_the_other(model: Transformer, image: int, sampling: Sampling) -> Tensor:
    """MaskGIT's decoding as the paper tells it, one image and one token at a time."""
    scheme, count, mask = model.scheme, 12, 24
    assert isinstance(scheme, Masked)
    drawn = uniforms(0, [image], scheme.uniforms(count), CPU).view(scheme.steps, 2, count)
    tokens, left = [mask] * count, count
    for step in range(1, scheme.steps + 1):
        logits = model(torch.tensor([tokens]), model.condition.prefix(1, {}))[0]
        surest = []
        for k in range(count):
            if tokens[k] != mask:
                continue
            token = int(sampling.choose(logits[k : k + 1], drawn[step - 1, 0, k : k + 1]))
            noise = -math.log(-math.log(max(float(drawn[step - 1, 1, k]), 2**-53)))
            sure = float(logits[k].log_softmax(0)[token])
            sure += scheme.choice_temperature * (1 - step / scheme.steps) * noise
            surest.append((sure, k, token))
        left = min(left - 1, math.floor(count * math.cos(math.pi / 2 * step / scheme.steps)))
        for _, k, token in sorted(surest, reverse=True)[: len(surest) - left]:
            tokens[k] = token
    return torch.tensor(tokens)


def test_without_noise_the_next_index_reads_what_it_is_to_say() -> None:
    scheme = NextIndex()
    assert scheme.draw((3, 12), 24, torch.Generator()) == {}
    pair = scheme.training_pair(TOKENS, {}, 24)
    assert pair.inputs is pair.targets is TOKENS
    assert pair.weights is None


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
    model = tiny(NextIndex())
    prefix = model.condition.prefix(2, {})
    found = generated(model, [0, 1], temperature=0)
    expected = torch.zeros(2, 12, dtype=torch.int64)
    for k in range(12):  # the whole sequence anew for each token
        expected[:, k] = model(expected, prefix)[:, k].argmax(-1)
    assert torch.equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    images=st.sampled_from([2, 4, 8]),
    count=st.integers(1, 20),
    vocabulary=st.integers(2, 30),
    seed=st.integers(0, 2**31),
)
def test_each_image_has_its_rows_of_what_is_drawn_for_the_global_batch(
    name: str, images: int, count: int, vocabulary: int, seed: int
) -> None:
    scheme: Scheme = NextIndex(pkeep=0.5) if name == "next_index" else SCHEMES[name]()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (images, count), generator=generator)
    draws = scheme.draw((images, count), vocabulary, generator)
    whole = scheme.training_pair(tokens, draws, vocabulary)
    for rows in (slice(0, None, 2), slice(1, None, 2)):  # the images of two ranks
        mine = {part: drawn[rows] for part, drawn in draws.items()}
        pair = scheme.training_pair(tokens[rows], mine, vocabulary)
        assert torch.equal(pair.inputs, whole.inputs[rows])
        assert torch.equal(pair.targets, tokens[rows])
        if whole.weights is not None:
            assert pair.weights is not None
            assert torch.equal(pair.weights, whole.weights[rows])
    evaluated = scheme.evaluation_pair(tokens, vocabulary)
    for pair in (whole, evaluated):
        assert pair.inputs.max() < vocabulary + scheme.extra_tokens
    last = scheme.evaluation_pair(tokens[-1:], vocabulary)
    assert torch.equal(last.inputs, evaluated.inputs[-1:])  # whatever the batch


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 6), count=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_masked_tokens_and_only_they_count_all_alike(images: int, count: int, seed: int) -> None:
    scheme, generator = Masked(), torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, (images, count), generator=generator)
    nll = torch.rand(images, count, generator=generator)
    pair = scheme.training_pair(tokens, scheme.draw((images, count), 9, generator), 9)
    masked = pair.inputs == 9
    assert masked.any(1).all()
    assert torch.equal(pair.inputs[~masked], tokens[~masked])
    # over the global batch, however many tokens of each image are masked
    assert mean_of(nll, pair.weights).item() == pytest.approx(nll[masked].mean().item(), rel=1e-5)


def test_the_shares_that_are_masked_in_training_are_those_of_the_cosine_schedule() -> None:
    scheme, generator = Masked(), torch.Generator().manual_seed(0)
    draws = scheme.draw((4000, 100), 9, generator)
    pair = scheme.training_pair(torch.zeros(4000, 100, dtype=torch.int64), draws, 9)
    shares = (pair.inputs == 9).double().mean(1)
    assert shares.mean().item() == pytest.approx(2 / math.pi, abs=0.02)
    below_half = (shares <= 0.5).double().mean().item()
    assert below_half == pytest.approx(1 - math.acos(0.5) / (math.pi / 2), abs=0.03)
    assert (pair.inputs == 9).double().mean(0).std() < 0.02  # no place is masked more often


def test_images_are_evaluated_with_masks_of_all_shares() -> None:
    tokens = torch.zeros(EVALUATED, 64, dtype=torch.int64)
    tokens[:, 5] = torch.arange(EVALUATED)
    pair = Masked().evaluation_pair(tokens, 24)
    masked = pair.inputs == 24
    assert torch.equal(pair.weights, masked.float())
    counts = [math.ceil(64 * math.cos(math.pi / 2 * (k + 0.5) / EVALUATED)) for k in range(16)]
    assert masked.sum(1).tolist() == counts
    assert torch.equal(pair.inputs[~masked], tokens[~masked])


@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("knobs", [{}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.6}])
@torch.no_grad()
def test_masked_tokens_are_generated_as_the_paper_tells_it(steps: int, knobs: dict) -> None:
    model = tiny(Masked(steps=steps))
    found = generated(model, [0, 1, 2], **knobs)
    for image in range(3):
        expected = one_after_the_other(model, image, Sampling(**knobs))
        assert torch.equal(found[image], expected)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["masked", "next_index"]),
    images=st.lists(st.integers(0, 99), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    leading=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_known_tokens_stay_and_the_others_are_as_if_these_had_been_drawn(
    name: str, images: list[int], share: float, leading: int, seed: int
) -> None:
    model = tiny(SCHEMES[name]())
    randomness = torch.Generator().manual_seed(seed)
    whole = generated(model, images)
    mask = torch.rand(len(images), 12, generator=randomness) < share
    mask[:, :leading] = True
    leading = int(mask.all(0).long().cumprod(0).sum())
    tokens = torch.where(mask, torch.randint(24, mask.shape, generator=randomness), -1)
    found = generated(model, images, known=KnownTokens(tokens, mask, leading))
    assert torch.equal(found[mask], tokens[mask])
    assert 0 <= found.min() <= found.max() < 24
    for row, image in enumerate(images):  # each alone
        own = slice(row, row + 1)
        alone = generated(model, [image], known=KnownTokens(tokens[own], mask[own]))
        assert torch.equal(alone, found[own])
    if name == "next_index":  # what it would have written itself is as good as known
        again = generated(model, images, known=KnownTokens(whole, mask, leading))
        assert torch.equal(again, whole)


@torch.no_grad()
def test_the_masked_scheme_counts_the_unknown_tokens_of_each_image() -> None:
    network = Recorded(5, flat=False)
    scheme, mask = Masked(steps=4), torch.zeros(3, 12, dtype=torch.bool)
    mask[1, ::2], mask[2, :10] = True, True
    known = KnownTokens(torch.zeros(3, 12, dtype=torch.int64), mask)
    prefix = Prefix((torch.zeros(3, 1, dtype=torch.int64),))
    drawn = uniforms(0, range(3), scheme.uniforms(12), CPU)
    scheme.generate(network, prefix, 12, 5, Sampling().choose, drawn, known)
    masked = [(read == 5).sum(1).tolist() for read in network.read]
    assert masked == [[12, 6, 2], [11, 5, 1], [8, 4, 0], [4, 2, 0]]


class Recorded:
    """A network with random logits, the same for the same call; it keeps what it has read."""

    def __init__(self, vocabulary: int, flat: bool) -> None:
        self.vocabulary, self.flat, self.read = vocabulary, flat, []

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        self.read.append(tokens)
        shape = (*tokens.shape, self.vocabulary)
        if self.flat:  # every choice is as sure as any other
            return torch.zeros(shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(self.read)))


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 9),
    count=st.integers(1, 14),
    vocabulary=st.integers(1, 5),
    choice_temperature=st.sampled_from([0.0, 4.5]),
    flat=st.booleans(),
    zero=st.booleans(),
)
def test_every_token_is_written_once_and_as_many_per_step_as_the_schedule_says(
    steps: int, count: int, vocabulary: int, choice_temperature: float, flat: bool, zero: bool
) -> None:
    scheme, network = Masked(steps, choice_temperature), Recorded(vocabulary, flat)
    drawn = uniforms(0, range(2), scheme.uniforms(count), CPU) * (not zero)
    prefix = Prefix((torch.zeros(2, 1, dtype=torch.int64),))
    choose = Sampling(top_k=3).choose
    tokens = scheme.generate(network, prefix, count, vocabulary, choose, drawn)
    assert 0 <= tokens.min() <= tokens.max() < vocabulary
    taken = min(steps, count)
    assert len(network.read) == taken
    left = [int(each) for each in still_masked(torch.tensor([count]), taken)]
    for count_now, read in zip(left, [*network.read[1:], tokens], strict=True):
        masked = read == vocabulary
        assert (masked.sum(1) == count_now).all()
        assert torch.equal(read[~masked], tokens[~masked])  # nothing is written over
    assert left == sorted(set(left), reverse=True)  # each step writes some
    assert left[-1] == 0


def test_logits_of_a_few_images_are_held_at_once_and_the_tokens_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve tokens of 24 codes: with room for 600 logits two of five images go together."""
    model = tiny(Masked(steps=3))
    whole = generated(model, [0, 1, 2, 3, 4])
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    monkeypatch.setattr(masked, "LOGITS", 600)
    assert torch.equal(generated(model, [0, 1, 2, 3, 4]), whole)
    assert read == 3 * [2, 2, 1]


def test_of_equal_values_the_first_has_the_lower_rank() -> None:
    values = torch.tensor([[0.5, 0.1, 0.5, -torch.inf, 0.1]])
    assert ranks(values).tolist() == [[3, 1, 4, 0, 2]]


def test_the_masked_scheme_has_a_position_and_a_logit_for_each_token_and_sees_later_ones() -> None:
    masked = tiny(Masked())
    assert (masked.config.positions, masked.tok_emb.num_embeddings) == (13, 25)
    pair = masked.scheme.evaluation_pair(TOKENS, 24)
    prefix = masked.condition.prefix(3, {})
    logits = masked(pair.inputs, prefix)
    assert logits.shape == (3, 12, 24)
    changed = pair.inputs.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 24
    assert (masked(changed, prefix)[:, 0] - logits[:, 0]).abs().max() > 1e-6


def test_settings_of_the_masked_scheme_outside_their_range_are_refused() -> None:
    for settings_ in ({"steps": 0}, {"choice_temperature": -1.0}):
        (name,) = settings_
        with pytest.raises(UserError, match=rf"model\.scheme\.{name}="):
            Masked(**settings_)
