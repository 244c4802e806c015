"""The condition prefix: classes, codes of a second VQGAN, and the start token."""

from typing import Any

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    Condition,
    Request,
    Unconditional,
)
from taming_dist.models.prior.transformer import TransformerConfig


def no_shards(spec: Any) -> Any:
    raise AssertionError(f"{spec} was opened")


def asked(count: int, **given: Any) -> Request:
    return Request(count, no_shards, no_shards, **given)


def test_a_class_becomes_its_own_token() -> None:
    prefix = ClassCondition(10).part(3, {"cls": torch.tensor([0, 9, 4], dtype=torch.int32)})
    assert prefix.dtype == torch.int64
    assert prefix.tolist() == [[0], [9], [4]]


@pytest.mark.parametrize("outside", [10, -1])
def test_a_class_outside_the_model_is_refused_with_its_range(outside: int) -> None:
    with pytest.raises(UserError, match=rf"class_id: {outside} .* 0 to 9"):
        ClassCondition(10).part(2, {"cls": torch.tensor([3, outside])})


def test_a_class_condition_refuses_missing_or_miscounted_classes() -> None:
    with pytest.raises(UserError, match="class_id"):
        ClassCondition(10).part(2, {})
    with pytest.raises(UserError, match="2 images need 2 classes, not 3"):
        ClassCondition(10).part(2, {"cls": torch.tensor([1, 2, 3])})


def test_unconditional_images_start_alike_whatever_the_data_has() -> None:
    assert Unconditional().part(2, {}).tolist() == [[0], [0]]
    assert Unconditional().part(2, {"cls": torch.tensor([5, 7])}).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("condition", "columns"),
    [
        (Unconditional(), {}),
        (ClassCondition(5), {"cls": torch.tensor([0, 1, 2, 4])}),
        (CodesCondition(7, [2, 1]), {"cond": torch.full((4, 2, 1), 6)}),
    ],
)
def test_a_prefix_has_the_length_and_vocabulary_that_its_condition_states(
    condition: Condition, columns: dict[str, torch.Tensor]
) -> None:
    condition.check()
    assert columns.keys() == set(condition.columns)
    prefix = condition.part(4, columns)
    assert prefix.shape == (4, condition.length)
    assert int(prefix.max()) < condition.vocabulary


def test_classes_are_those_asked_for_or_take_turns() -> None:
    condition = ClassCondition(3)
    assert condition.requested(asked(2, class_id=1))["cls"].tolist() == [1, 1]
    assert condition.requested(asked(5))["cls"].tolist() == [0, 1, 2, 0, 1]
    assert (condition.period(asked(5)), condition.period(asked(5, class_id=1))) == (3, 1)


@pytest.mark.parametrize(
    ("condition", "given", "message"),
    [
        (Unconditional(), {"class_id": 0}, "class_id: this transformer is unconditional"),
        (Unconditional(), {"condition": "codes"}, "condition: .*unconditional, leave it out"),
        (ClassCondition(3), {"condition": "codes", "class_id": 1}, "class_id: .*leave one of"),
        (CodesCondition(3, [1, 1]), {"class_id": 0}, "class_id: .*not class-conditional"),
    ],
)
def test_what_a_condition_cannot_use_is_refused_by_name(
    condition: Condition, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        condition.requested(asked(2, **given))


def test_codes_of_a_second_vqgan_become_the_prefix_in_raster_order() -> None:
    condition = CodesCondition(9, [2, 3])
    assert (condition.length, condition.vocabulary) == (6, 9)
    codes = torch.tensor([[[0, 1, 2], [3, 4, 8]]], dtype=torch.int32)
    prefix = condition.part(1, {"cond": codes})
    assert prefix.dtype == torch.int64
    assert prefix.tolist() == [[0, 1, 2, 3, 4, 8]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--condition-model"),
        ({"cond": torch.zeros(1, 3, 2)}, r"grid \[2, 3\], not \[1, 3, 2\]"),
        ({"cond": torch.zeros(2, 2, 3)}, "1 images need"),
        ({"cond": torch.full((1, 2, 3), 9)}, "outside of 0 to 8"),
    ],
)
def test_codes_that_are_not_the_conditions_are_refused(
    given: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        CodesCondition(9, [2, 3]).part(1, given)


def test_conditions_that_lack_what_they_need_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.condition\.grid=\[\]"):
        CodesCondition().check()
    with pytest.raises(UserError, match=r"model\.condition\.classes: 0"):
        ClassCondition().check()


def test_a_condition_with_more_codes_than_the_image_has_is_refused() -> None:
    config = TransformerConfig(8, [2, 2], layers=1, condition=CodesCondition(9, [2, 2]))
    with pytest.raises(UserError, match=r"model/condition=codes: its 9 tokens"):
        config.check()
