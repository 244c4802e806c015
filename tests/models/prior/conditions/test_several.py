"""Several conditions at once, and what holds for every condition: lengths, ranges, batches, and
that the null prefix leaves out all of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import (
    CONDITIONS,
    ClassCondition,
    CodesCondition,
    Condition,
    CoordinatesCondition,
    ObjectCentersCondition,
    ObjectsCondition,
    Request,
    SeveralConditions,
    Unconditional,
)
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

OBJECTS: dict[str, Any] = {"categories": 5, "vocabulary": 60, "objects": 2}
EVERY: list[Condition] = [
    Unconditional(),
    ClassCondition(6),
    CodesCondition(7, [2, 3]),
    CoordinatesCondition(50, [2, 3], 4),
    ObjectsCondition(**OBJECTS),
    ObjectCentersCondition(**OBJECTS),
    SeveralConditions([{"name": "class", "classes": 6}, CodesCondition(7, [2, 3])]),
    SeveralConditions([ObjectsCondition(**OBJECTS), ClassCondition(6)]),
]
names = pytest.mark.parametrize(
    "condition", EVERY, ids=lambda condition: "+".join(each.name for each in condition.conditions)
)


def columns_of(count: int, seed: int) -> dict[str, Tensor]:
    """Random columns of which every condition here finds its own."""
    drawn = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, 4, (count,), generator=drawn).cumsum(0)
    boxes = torch.rand(int(ends[-1]), 4, generator=drawn) / 2
    crops = torch.rand(count, 5, generator=drawn) * 0.48 + 0.01
    return {
        "cls": torch.randint(6, (count,), generator=drawn),
        "cond": torch.randint(7, (count, 2, 3), generator=drawn),
        "crop": crops,
        "boxes": boxes,
        "box_class": torch.randint(5, (len(boxes),), generator=drawn),
        "box_flags": torch.randint(32, (len(boxes),), generator=drawn),
        "box_ends": ends,
    }


def row(columns: Mapping[str, Tensor], image: int) -> dict[str, Tensor]:
    """The columns of one of the images."""
    ends = columns["box_ends"].tolist()
    boxes = slice(ends[image - 1] if image else 0, ends[image])
    found = {name: column[image : image + 1] for name, column in columns.items()}
    found |= {name: columns[name][boxes] for name in ("boxes", "box_class", "box_flags")}
    return found | {"box_ends": torch.tensor([boxes.stop - boxes.start])}


@names
@given(st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_prefixes_have_their_length_and_range_and_do_not_depend_on_the_batch(
    condition: Condition, count: int, seed: int
) -> None:
    columns = columns_of(count, seed)
    prefix = condition.prefix(count, columns)
    assert prefix.length == condition.length == sum(e.length for e in condition.conditions)
    for each, part in zip(condition.conditions, prefix.parts, strict=True):
        assert part.dtype == torch.int64
        assert part.shape == (count, each.length)
        assert 0 <= part.min() <= part.max() < each.vocabulary <= condition.vocabulary
    for image in range(count):
        alone = condition.prefix(1, row(columns, image))
        for mine, all_of_it in zip(alone.parts, prefix.parts, strict=True):
            assert torch.equal(mine[0], all_of_it[image])


def transformer(condition: Condition, **keys: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "condition_table": "own"}
    model = Transformer(TransformerConfig(**sizes | {"vocabulary": 24, "grid": [2, 3],
                                                     "condition": condition} | keys))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@names
@torch.no_grad()
def test_the_null_prefix_leaves_out_all_of_the_condition(condition: Condition) -> None:
    if not condition.can_drop:
        with pytest.raises(UserError, match=r"loss\.condition_dropout: there is nothing to drop"):
            transformer(condition, null_prefix=True)
        return
    model = transformer(condition, null_prefix=True)
    tokens, dropped = torch.randint(24, (3, 6)), torch.tensor([True, False, True])
    prefixes = [condition.prefix(3, columns_of(3, seed)).dropping(dropped) for seed in (0, 4)]
    one, other = (model(tokens, prefix) for prefix in prefixes)
    assert torch.equal(one[dropped], other[dropped])
    assert (one[~dropped] - other[~dropped]).abs().max() > 1e-2
    begun = [model.begin(prefix)[0] for prefix in prefixes]
    assert torch.equal(begun[0][dropped], begun[1][dropped])


@torch.no_grad()
def test_each_of_several_has_its_own_table_and_is_read() -> None:
    of = [ClassCondition(6), CodesCondition(7, [2, 3]), CoordinatesCondition(50, [2, 3], 4)]
    model = transformer(SeveralConditions(of))
    assert [table.num_embeddings for table in model.cond_emb] == [6, 7, 51]  # type: ignore[union-attr]
    columns = columns_of(2, 0)
    tokens = torch.randint(24, (2, 6))
    plain = model(tokens, model.condition.prefix(2, columns))
    for name in ("cls", "cond", "crop"):
        changed = columns | {name: columns_of(2, 5)[name]}
        assert (model(tokens, model.condition.prefix(2, changed)) - plain).abs().max() > 1e-3
    back = transformer(SeveralConditions(of[::-1]))
    assert [table.num_embeddings for table in back.cond_emb] == [51, 7, 6]  # type: ignore[union-attr]


@torch.no_grad()
def test_several_may_share_the_table_of_the_codes() -> None:
    several = SeveralConditions([ClassCondition(6), CodesCondition(7, [2, 3])])
    model = transformer(several, condition_table="shared")
    assert model.cond_emb is None
    columns = columns_of(2, 0)
    assert model(torch.randint(24, (2, 6)), several.prefix(2, columns)).isfinite().all()
    with pytest.raises(UserError, match="its 25 tokens do not fit vocabulary=24"):
        transformer(SeveralConditions([ClassCondition(25)]), condition_table="shared")


def test_an_export_keeps_several_and_their_order(tmp_path: Any) -> None:
    several = SeveralConditions([CodesCondition(7, [2, 3]), ClassCondition(6)])
    model = transformer(several)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.condition == several
    assert loaded.fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (["class", "class"], r"model\.condition\.of=\['class', 'class'\]: name each .* once"),
        (["clas"], r"model\.condition\.of=clas: use one of class, codes"),
        (["none"], r"model\.condition\.of=none: use one of class"),
        (["several"], r"model\.condition\.of=several: use one of"),
        ([{"name": "class", "clases": 3}], r"model\.condition\.of: class has no key clases, use"),
        ([7], r"model\.condition\.of=7: use names of class"),
    ],
)
def test_what_several_cannot_be_is_refused(of: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SeveralConditions(of)
    with pytest.raises(UserError, match=r"model\.condition\.of=\[\]"):
        SeveralConditions().check()


class Shards:
    """Code shards with classes and codes of a second VQGAN."""

    vocabulary, grid, image_size, tokenizer_fingerprint = 24, (2, 3), 8, "a" * 64
    condition = {"vocab": 7, "grid": [2, 3], "fingerprint": "b" * 64}
    num_classes, class_names, num_samples, classes_present = 6, None, 8, True

    def check_classes(self) -> None: ...
    def require(self, columns: Any) -> None: ...
    def samples(self, images: range, columns: Any) -> dict[str, Tensor]:
        own = columns_of(len(images), 3)
        return {name: own[name] for name in columns}


def request(**keys: Any) -> Request:
    layout = {"objects": [{"category": 3, "box": [0, 0, 1, 1]}]}
    return Request(2, lambda spec: Shards(), lambda path: layout, **keys)


def test_a_request_has_something_for_each() -> None:
    both = SeveralConditions([ClassCondition(6), CodesCondition(7, [2, 3])])
    shards = columns_of(2, 3)
    found = both.requested(request(condition="codes"))
    assert torch.equal(found["cls"], shards["cls"])
    assert torch.equal(found["cond"], shards["cond"])
    found = both.requested(request(condition="codes", class_id=4))
    assert found["cls"].tolist() == [4, 4]
    assert torch.equal(found["cond"], shards["cond"])
    found = both.requested(request(condition={"codes": "codes"}))
    assert found["cls"].tolist() == [0, 1]


def test_a_layout_goes_with_a_class_and_with_codes() -> None:
    several = SeveralConditions([ClassCondition(6), ObjectsCondition(**OBJECTS)])
    found = several.requested(request(condition="layout.json", class_id=5))
    assert (found["cls"].tolist(), found["box_class"].tolist()) == ([5, 5], [3, 3])
    assert several.requested(request(condition="layout.json"))["cls"].tolist() == [0, 1]
    third = SeveralConditions([CodesCondition(7, [2, 3]), ObjectsCondition(**OBJECTS)])
    each = {"codes": "codes", "objects": "layout.json"}
    found = third.requested(request(condition=each))
    assert third.prefix(2, found).length == third.length
    assert third.images(found) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"condition": {"class": "codes", "seg": "codes"}}, "seg is none of class, codes"),
        ({"class_id": 1, "condition": {"class": "codes"}}, "class_id: .*leave one of the two out"),
    ],
)
def test_requests_that_nobody_can_use_are_refused(keys: dict[str, Any], message: str) -> None:
    both = SeveralConditions([ClassCondition(6), CodesCondition(7, [2, 3])])
    with pytest.raises(UserError, match=message):
        both.requested(request(**keys))
    without = SeveralConditions([CodesCondition(7, [2, 3])])
    with pytest.raises(UserError, match="class_id: .*not class-conditional"):
        without.requested(request(class_id=1, condition="codes"))


def test_from_python_each_is_given_by_its_name_or_by_its_columns() -> None:
    several = SeveralConditions([ClassCondition(6), ObjectsCondition(**OBJECTS)])
    layout = {"objects": [{"category": 3, "box": [0, 0, 1, 1]}]}
    found = several.given({"objects": [layout, layout], "class": [1, 2]})
    assert several.images(found) == 2
    assert several.prefix(2, found).parts[0].tolist() == [[1], [2]]
    assert several.given({"cls": [1, 2]})["cls"].tolist() == [1, 2]
    with pytest.raises(UserError, match="give what class, objects take by these names"):
        several.given([1, 2])


def test_every_condition_is_registered_by_its_name() -> None:
    assert {name: kind().name for name, kind in CONDITIONS.items()} == {n: n for n in CONDITIONS}
    assert all(dataclasses.is_dataclass(kind) for kind in CONDITIONS.values())
