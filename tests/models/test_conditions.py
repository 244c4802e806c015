"""The condition prefix: classes and the start token."""

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.models.conditions import ClassCondition, Unconditional, build_condition


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
