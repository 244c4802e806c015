import math
from decimal import Decimal
from typing import Any

import pytest

from taming_dist.formats.classes import MAX_CLASSES, class_fault, number_labels, whole_number


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ({0, 2, 10}, {0: 0, 2: 2, 10: 10}),
        ({0.0, 2.0, math.nan, None}, {0.0: 0, 2.0: 2}),
        ({"0", "2", "10", ""}, {"0": 0, "2": 2, "10": 10}),
        ({"1.0", "03"}, {"1.0": 1, "03": 3}),
        ({False, True}, {False: 0, True: 1}),
        ({Decimal(4), "5", 6.0}, {Decimal(4): 4, "5": 5, 6.0: 6}),
        ({None}, {}),
    ],
)
def test_whole_numbers_of_any_type_are_ids(labels: set[Any], ids: dict[Any, int]) -> None:
    numbering = number_labels(labels)
    assert (numbering.ids, numbering.names) == (ids, None)


def test_names_are_numbered_in_natural_order() -> None:
    numbering = number_labels({"k10", "k2", "cat", "7", None})
    assert numbering.names == ("7", "cat", "k2", "k10")
    assert numbering.ids == {"7": 0, "cat": 1, "k2": 2, "k10": 3}
    assert number_labels({"caf\udce9"}).names == ("caf\\xe9",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({0.5}, r"0\.5 is not a class: use whole numbers or names"),
        ({"0.5", "1"}, r"'0\.5' is not a class"),
        ({math.inf, 1}, "inf is not a class"),
        ({3, "cat"}, "3 is a number, but 'cat' is a name"),
        ({0.5, "cat"}, r"0\.5 is a number, but 'cat' is a name"),
    ],
)
def test_what_is_neither_is_refused(labels: set[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        number_labels(labels)


def test_ids_have_a_range() -> None:
    assert class_fault(0) is None
    assert class_fault(MAX_CLASSES - 1) is None
    for number in (-1, MAX_CLASSES, 2**33):
        assert str(number) in str(class_fault(number))


def test_a_text_of_many_digits_is_no_number() -> None:
    assert whole_number("9" * 5000) is None
