"""Every number that a user sets has a range, and what lies outside is refused with its key."""

import dataclasses
import importlib
import math
import pkgutil
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf

import taming_dist
from taming_dist.app.config import DemoConfig
from taming_dist.errors import UserError
from taming_dist.evaluate import EvaluateConfig
from taming_dist.guiding.config import ClipConfig
from taming_dist.losses.terms import TermConfig
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.ranges import LARGEST_INT, RANGE, Kind, Range, check_ranges, kind_of, ranged
from taming_dist.sample import SampleConfig
from taming_dist.stages import schemas
from taming_dist.stages.interface import Config
from taming_dist.training.optimization import OptimConfig

REQUIRED: dict[type, dict[str, Any]] = {TransformerConfig: {"vocabulary": 0, "grid": []}}


def config_classes() -> Iterator[tuple[str, type]]:
    """Every config class with what its keys start with on the command line."""
    yield from (("", EvaluateConfig), ("", SampleConfig), ("", DemoConfig), ("", ClipConfig))
    for group, classes in schemas().items():
        yield from ((group.replace("/", ".") + ".", schema) for schema in classes.values())
    for name, hint in typing.get_type_hints(Config).items():
        for kind in typing.get_args(hint) or (hint,):  # some may be None
            if dataclasses.is_dataclass(kind):
                yield f"{name}.", kind


@dataclasses.dataclass(frozen=True)
class Number:
    """A numeric field of a config class."""

    key: str
    owner: type
    field: Any
    kind: Kind

    @property
    def limits(self) -> Range:
        return self.field.metadata[RANGE]

    def made_with(self, value: Any) -> Any:
        """The config class with this value, and defaults elsewhere, checked."""
        made = self.owner(**REQUIRED.get(self.owner, {}) | {self.field.name: value})
        if isinstance(made, TermConfig):  # checked by who knows its name
            made.check(self.key.removesuffix(f".{self.field.name}"))
        return made

    def outside(self) -> list[Any]:
        """Values just below and just above the range, and what is no number."""
        limits, whole = self.limits, self.kind.number is int
        ends = [end for end in (limits.above, limits.below) if end is not None]
        for end, towards in ((limits.at_least, -math.inf), (limits.at_most, math.inf)):
            if end is not None:
                step = 1 if towards > 0 else -1
                ends.append(end + step if whole else math.nextafter(end, towards))
        if limits.at_most is limits.below is None:
            ends.append(LARGEST_INT + 1 if whole else math.inf)
        ends += ["many", True, 1.5 if whole else math.nan]
        if not self.kind.is_list:
            return [*ends, [1]] + ([] if self.kind.optional else [None])
        lists = [[end] * (limits.length or 1) for end in ends]
        lists += [[1] * (limits.length + 1)] if limits.length else []
        return [*lists, 1, None] + ([] if limits.empty else [[]])


def numbers() -> list[Number]:
    found = []
    for prefix, owner in config_classes():
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            kind = kind_of(hints[field.name])
            if kind is not None:
                found.append(Number(prefix + field.name, owner, field, kind))
    return found


def test_the_walk_meets_every_config_class_of_the_package() -> None:
    for module in pkgutil.walk_packages(taming_dist.__path__, "taming_dist."):
        importlib.import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.startswith("taming_dist.")]
    named = {
        value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("Config") and dataclasses.is_dataclass(value)
    }
    owners = {owner for _, owner in config_classes()}
    bases = {value for value in named if any(value in owner.__mro__[1:] for owner in owners)}
    assert named - bases - {Config} <= owners


def test_every_number_of_every_config_class_has_a_range_with_a_lower_end() -> None:
    without = [number.key for number in numbers() if RANGE not in number.field.metadata]
    assert without == []
    endless = [n.key for n in numbers() if n.limits.at_least is None and n.limits.above is None]
    assert endless == []


@pytest.mark.parametrize("number", numbers(), ids=lambda n: f"{n.owner.__name__}.{n.field.name}")
def test_what_lies_outside_of_a_range_is_refused_with_its_key(number: Number) -> None:
    for value in number.outside():
        with pytest.raises(UserError) as refusal:
            number.made_with(value)
        assert str(refusal.value).startswith(f"{number.key}="), value
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("limits", "kind", "inside", "outside", "words"),
    [
        (Range(at_least=1), Kind(int, False, False), [1, 9], [0], "a whole number from 1"),
        (
            Range(at_least=0, below=1),
            Kind(float, False, False),
            [0, 0.999],
            [-1e-9, 1.0],
            "a number from 0 to below 1",
        ),
        (
            Range(above=0, at_most=1),
            Kind(float, False, True),
            [1e-9, 1, None],
            [0.0, 1.1],
            "a number above 0 to 1 or null",
        ),
        (
            Range(at_least=1, length=2, empty=True),
            Kind(int, True, False),
            [[], [1, 1]],
            [[1], [1, 0]],
            "2 whole numbers from 1, or []",
        ),
        (
            Range(at_least=1),
            Kind(int, True, False),
            [[1], (1, 2)],
            [[], 1],
            "one or more whole numbers from 1",
        ),
    ],
)
def test_the_ends_of_a_range_are_kept_and_told_in_words(
    limits: Range, kind: Kind, inside: list[Any], outside: list[Any], words: str
) -> None:
    for value in inside:
        limits.check("key", value, kind)
    for value in outside:
        with pytest.raises(UserError) as refusal:
            limits.check("key", value, kind)
        assert str(refusal.value) == f"key={value}: use {words}"


def test_ranges_hold_for_configs_that_omegaconf_makes() -> None:
    config = OmegaConf.structured(OptimConfig)
    config.lr, config.betas = 1e-3, [0.9, 1.0]
    with pytest.raises(UserError, match=r"^optim\.betas=\[0\.9, 1\.0\]: use 2 numbers from 0 to "):
        OmegaConf.to_object(config)


def test_a_list_as_default_is_not_shared() -> None:
    @dataclasses.dataclass
    class Example:
        sizes: list[int] = ranged([1, 2], at_least=1)

        def __post_init__(self) -> None:
            check_ranges(self)

    Example().sizes.append(3)
    assert Example().sizes == [1, 2]
