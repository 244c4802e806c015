"""The condition prefix: classes and the start token."""

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    Unconditional,
    build_condition,
)
from taming_dist.models.prior.transformer import TransformerConfig


def test_a_class_becomes_its_own_token() -> None:
    prefix = ClassCondition(10).tokens(3, torch.tensor([0, 9, 4], dtype=torch.int32))
    assert prefix.dtype == torch.int64
    assert prefix.tolist() == [[0], [9], [4]]


@pytest.mark.parametrize("outside", [10, -1])
def test_a_class_outside_the_model_is_refused_with_its_range(outside: int) -> None:
    with pytest.raises(UserError, match=rf"class_id: {outside} .* 0 to 9"):
        ClassCondition(10).tokens(2, torch.tensor([3, outside]))


def test_a_class_condition_refuses_missing_or_miscounted_classes() -> None:
    with pytest.raises(UserError, match="class_id"):
        ClassCondition(10).tokens(2)
    with pytest.raises(UserError, match="2 images need 2 classes, not 3"):
        ClassCondition(10).tokens(2, torch.tensor([1, 2, 3]))


def test_unconditional_images_start_alike_whatever_classes_the_data_has() -> None:
    condition = Unconditional()
    assert condition.tokens(2).tolist() == [[0], [0]]
    assert condition.tokens(2, torch.tensor([5, 7])).tolist() == [[0], [0]]


@pytest.mark.parametrize(("name", "classes"), [("class", 5), ("none", 0)])
def test_a_prefix_has_the_length_and_vocabulary_that_its_condition_states(
    name: str, classes: int
) -> None:
    condition = build_condition(name, classes)
    prefix = condition.tokens(4, torch.tensor([0, 1, 2, 4]))
    assert prefix.shape == (4, condition.length)
    assert int(prefix.max()) < condition.vocabulary


def test_unknown_conditions_and_missing_class_counts_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.condition: 'depth'"):
        build_condition("depth", 0)
    with pytest.raises(UserError, match=r"model\.classes: 0"):
        build_condition("class", 0)


def test_codes_of_a_second_vqgan_become_the_prefix_in_raster_order() -> None:
    condition = CodesCondition([2, 3], 9)
    assert (condition.length, condition.vocabulary) == (6, 9)
    prefix = condition.tokens(1, torch.tensor([[[0, 1, 2], [3, 4, 8]]], dtype=torch.int32))
    assert prefix.dtype == torch.int64
    assert prefix.tolist() == [[0, 1, 2, 3, 4, 8]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "--condition-model"),
        (torch.zeros(1, 3, 2), r"grid \[2, 3\], not \[1, 3, 2\]"),
        (torch.zeros(2, 2, 3), "1 images need"),
        (torch.full((1, 2, 3), 9), "outside of 0 to 8"),
    ],
)
def test_codes_that_are_not_the_conditions_are_refused(
    given: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        CodesCondition([2, 3], 9).tokens(1, given)


def test_a_condition_on_codes_needs_their_grid() -> None:
    with pytest.raises(UserError, match=r"model\.condition_grid: \[\]"):
        build_condition("codes", 0)


def test_a_condition_with_more_codes_than_the_image_has_is_refused() -> None:
    config = TransformerConfig(
        8, [2, 2], layers=1, condition="codes", condition_grid=[2, 2], condition_vocabulary=9
    )
    with pytest.raises(UserError, match=r"model\.condition_vocabulary: 9 condition tokens"):
        config.check()
