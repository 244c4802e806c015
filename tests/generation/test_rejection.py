"""Rejection sampling: the best of an image's candidates, and what they are compared by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.rejection import Rejection, best_of, log_likelihood, scored
from taming_dist.models.prior.orders import ZCurve, arrange
from taming_dist.models.prior.schemes import Masked
from tests.generation.test_generator import tiny_transformer, tiny_vqgan


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_each_image_keeps_its_best_candidate(count: int, images: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(9, (count, images, 2, 2), generator=generator)
    scores = torch.randint(3, (count, images), generator=generator).double()  # with ties
    told = iter(scores)
    best, highest = best_of(list(codes), lambda _: next(told))
    for image in range(images):
        own = scores[:, image].tolist()
        assert highest[image] == max(own)
        assert torch.equal(best[image], codes[own.index(max(own)), image])


def test_a_score_that_is_not_a_number_is_the_worst() -> None:
    scores = iter([torch.tensor([torch.nan, -1.0]), torch.tensor([-9.0, torch.nan])])
    best, highest = best_of([torch.zeros(2, 1, 1), torch.ones(2, 1, 1)], lambda _: next(scores))
    assert best.flatten().tolist() == [1, 0]
    assert highest.tolist() == [-9, -1]


def test_a_classifier_that_gives_another_number_of_scores_is_refused() -> None:
    images, classes = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match=r"classifier: it gave scores \[3\] for 2 images"):
        scored(lambda *_: torch.zeros(3), images, classes)


def test_the_likelihood_is_that_of_one_code_after_the_other() -> None:
    vqgan = tiny_vqgan()
    transformer = tiny_transformer(vqgan, order=ZCurve()).eval()
    codes = torch.randint(24, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    prefix = transformer.condition.prefix(2, {})
    tokens = arrange(codes, transformer.places)
    slow: Tensor = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = transformer.begin(prefix)
        for k in range(12):
            slow += logits.double().log_softmax(-1).gather(1, tokens[:, k : k + 1])[:, 0]
            if k < 11:
                logits = transformer.step(tokens[:, k : k + 1], cache)
        found = log_likelihood(transformer, codes, prefix)
    assert torch.allclose(found, slow, rtol=1e-5)


def test_a_masked_transformer_has_no_likelihood_to_choose_by() -> None:
    transformer = tiny_transformer(tiny_vqgan(), scheme=Masked())
    with pytest.raises(UserError, match=r"acceptance: .*masked has no likelihood.*classifier"):
        log_likelihood(
            transformer, torch.zeros(1, 3, 4).long(), transformer.condition.prefix(1, {})
        )


@pytest.mark.parametrize(("acceptance", "count"), [(1.0, 1), (0.05, 20), (0.3, 3), (0.005, 200)])
def test_the_acceptance_rate_says_how_many_candidates_there_are(
    acceptance: float, count: int
) -> None:
    assert Rejection(acceptance).candidates == count


@pytest.mark.parametrize("acceptance", [0.0, -1.0, 1.5, 5e-324])
def test_a_rate_that_is_none_is_refused(acceptance: float) -> None:
    with pytest.raises(UserError, match="acceptance="):
        Rejection(acceptance)
