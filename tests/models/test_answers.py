"""What is compared between an export and a run that starts from it: all keys but those marked."""

from dataclasses import dataclass, field
from typing import Any

from taming_dist.models.answers import other_answers
from taming_dist.models.modalities import RGB, Depth
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    SeveralConditions,
)
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import FSQuantizerConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.ranges import marked, ranged


@dataclass
class Part:
    newer: int = 1
    weight: float = ranged(0.0, at_least=0, compared=False)
    start: str = marked("random", compared=False)


@dataclass
class Whole:
    part: Part = field(default_factory=Part)


def keys(theirs: Any, ours: Any) -> list[str]:
    return [difference.key for difference in other_answers(theirs, ours)]


def test_a_key_that_nobody_has_marked_is_compared() -> None:
    assert keys(Whole(Part(newer=2)), Whole()) == ["model.part.newer"]
    assert keys(Whole(Part(weight=2.0, start="data")), Whole()) == []


def test_of_real_configs_what_only_steers_training_may_differ() -> None:
    vector = VectorQuantizerConfig(codes=8, dim=2)
    other = VectorQuantizerConfig(codes=8, dim=2, beta=1.0, legacy=True, revive_below=0.1)
    assert keys(VQGANConfig(vector), VQGANConfig(other, dropout=0.1)) == []
    turned = (
        FSQuantizerConfig(levels=[3, 5]),
        FSQuantizerConfig(levels=[5, 3]),
    )  # of the same shapes
    assert keys(*map(VQGANConfig, turned)) == ["model.quantizer.levels"]
    assert keys(VQGANConfig(vector), VQGANConfig(turned[0])) == ["model.quantizer"]
    seen = VQGANConfig(vector, modality=RGB()), VQGANConfig(vector, modality=Depth())
    assert keys(*seen) == ["model.modality"]
    gpt = TransformerConfig(8, [2, 2], condition=ClassCondition(3))
    more = TransformerConfig(8, [2, 2], heads=8, dropout_embedding=0.1, condition=ClassCondition(4))
    assert keys(gpt, more) == ["model.heads", "model.condition.classes"]


def test_several_conditions_are_compared_one_by_one_and_in_their_order() -> None:
    def gpt(*of: Any) -> TransformerConfig:
        return TransformerConfig(8, [2, 2], condition=SeveralConditions(list(of)))

    codes, other = (CodesCondition(7, [2, 3], fingerprint) for fingerprint in ("a", "b"))
    assert keys(gpt(ClassCondition(3), codes), gpt(ClassCondition(3), other)) == []
    assert keys(gpt(ClassCondition(3)), gpt(ClassCondition(4))) == ["model.condition.of.0.classes"]
    assert keys(gpt("class", codes), gpt(codes, "class")) == [
        "model.condition.of.0",
        "model.condition.of.1",
    ]
    assert keys(gpt("class", codes), gpt("class")) == ["model.condition.of"]
