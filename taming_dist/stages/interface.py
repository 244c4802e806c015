"""What a stage is: its config classes, the data that it opens, and the recipe that it trains by.

config.py, train.py and the tools know stages by this and by the registry (`taming_dist.stages`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from omegaconf import MISSING
from torch import nn

from taming_dist.data.batching import BatchSizes, DataConfig
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.distribution import HIGHER_IS_BETTER
from taming_dist.launch import Place
from taming_dist.models.export import Exported, ModelConfig
from taming_dist.ranges import LARGEST_SEED, check_ranges, ranged
from taming_dist.stages.context import Context
from taming_dist.training.best import Criterion
from taming_dist.training.distances import Distances
from taming_dist.training.optimization import OptimConfig
from taming_dist.training.profiling import ProfileConfig
from taming_dist.training.recipe import Recipe
from taming_dist.training.run import EVALUATION, VALIDATION, Data, LoopConfig
from taming_dist.training.sinks import LogConfig
from taming_dist.training.workload import Workload


@dataclasses.dataclass
class LossConfig:
    """Base of the `loss` group of every stage."""


@dataclasses.dataclass
class RunConfig:
    """`dir` is the run directory; starting again with the same one resumes the run. `init`: an
    export whose weights a new run starts from, instead of random ones."""

    name: str = MISSING
    dir: str = "outputs/${run.name}"
    seed: int = ranged(23, at_least=0, at_most=LARGEST_SEED)
    init: str = ""

    def __post_init__(self) -> None:
        check_ranges(self, "run")
        if ".." in Path(self.name).parts:
            raise UserError(f"run.name={self.name} leaves the folder of all runs: give run.dir=...")
        if not Path(self.name.strip("/")).parts:
            raise UserError(f"run.name={self.name} is not the name of a folder: give another")
        if not self.dir.strip() or not f"{self.name}{self.dir}".isprintable():
            raise UserError(f"run.dir={self.dir!r} is not a folder: give its path, or a run.name")


@dataclasses.dataclass
class Config:
    """All of `python -m taming_dist.train`. Model, loss and data are those of one stage."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    train: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    model: ModelConfig = MISSING
    loss: LossConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    scale: dict[str, Any] | None = None  # what +scale=NAME stands for, until it is known for which
    scaled: list[str] = dataclasses.field(default_factory=list)  # stage; then what it changes
    debug: ProfileConfig | None = None  # +debug=profile
    dry_run: bool | int | None = None  # only tell what the run would be, on so many ranks


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run starts: on which rank, with which cut of the global batch, in which folder, and
    from the weights of which export (`init`; empty: random ones, or those of its checkpoint)."""

    here: Place
    batch: BatchSizes
    run_dir: Path
    init: str = ""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a stage opens before the ranks meet. A stage adds what its recipe needs beside."""

    data: Data


@dataclasses.dataclass(frozen=True)
class Planned:
    """A network of a run that has not started: `module` is on the meta device, without memory.

    `averaged`: its weights have the moving average if there is one; `largest_zero`: the stage of
    ZeRO that it stays at where the run has a larger one.
    """

    module: nn.Module
    averaged: bool = False
    largest_zero: int = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """The networks of a run that has not started, by name, and what else there is to say of it."""

    networks: Mapping[str, Planned]
    notes: Sequence[str] = ()


OpenedT = TypeVar("OpenedT", bound=Opened)
Part = TypeVar("Part")


class Stage(Generic[OpenedT]):
    """One stage of training, which trains a `network`. `model`, or a class derived from it, and
    `loss` are the config classes that go together, and with any of `schemas["data"]`.

    `has_objective`: the first metric of its validation is what training minimises, so that the best
    model by it is kept unless `train.best` says otherwise.

    `schemas`: the config classes by config group and by the name that the files in conf/ list in
    their defaults, without its `_schema`.

    `distance_prefix`: how the names of FID and its kin begin (rfid: of reconstructions).
    """

    network: ClassVar[type[Exported]]
    model: ClassVar[type[ModelConfig]]
    loss: ClassVar[type[LossConfig]]
    schemas: ClassVar[Mapping[str, Mapping[str, type]]]
    has_objective: ClassVar[bool] = False
    distance_prefix: ClassVar[str] = ""

    def compared(self, config: Config) -> Mapping[str, bool]:
        """The metrics of validation by which models can be compared: whether higher is better, by
        name, such as nll."""
        raise NotImplementedError

    def criterion(self, config: Config) -> Criterion | None:
        """By what the best model is chosen, as `train.best` says; None: it is not.

        Raises:
            UserError: validation has no such metric, or patience has none to go by.
        """
        known = {f"{VALIDATION}/{name}": higher for name, higher in self.compared(config).items()}
        asked = config.train.best
        if asked == "auto":
            asked = next(iter(known)) if self.has_objective else None
        if config.train.evaluate_every:
            for name, higher in HIGHER_IS_BETTER.items():
                known[f"{EVALUATION}/{self.distance_prefix}{name}"] = higher
        names = ", ".join(known)
        if not asked:
            if config.train.patience:
                raise UserError(
                    f"train.patience={config.train.patience} needs a metric that should get "
                    f"better: give train.best, one of {names}"
                )
            return None
        if asked not in known:
            raise UserError(f"train.best={asked}: use auto, null, or one of {names}")
        return Criterion(asked, known[asked])

    def check_freeze(self, config: Config) -> None:
        """Check that what `train.freeze` names is there, and that something is left to train.

        Raises:
            UserError: it is not, or the weights that should stay would be random.
        """
        asked, parts = config.train.freeze, self.network.parts
        if not asked:
            return
        said = f"train.freeze=[{','.join(asked)}]"
        if not parts:
            raise UserError(f"{said}: a {self.network.kind} is trained whole, leave it out")
        unknown = [name for name in asked if name not in parts]
        if unknown:
            raise UserError(f"{said}: there is no {unknown[0]}, use {', '.join(parts)}")
        if "quantizer" in asked and "encoder" not in asked:
            raise UserError(f"{said}: a codebook stays only with its encoder, name both")
        if not set(parts) - set(asked):
            raise UserError(f"{said} leaves nothing to train: leave one of them out")
        if not config.run.init:
            raise UserError(f"{said} would keep random weights: give run.init=EXPORT")

    def check(self, config: Config) -> None:
        """Check what no part can check alone.

        Raises:
            UserError: parts that do not go together, naming their keys.
        """

    def plan(self, config: Config) -> Plan:
        """The networks that `recipe` would train, and frozen ones; called under torch's meta
        device. Nothing is read but what decides their sizes.

        Raises:
            UserError: the sizes are not known.
        """
        raise NotImplementedError

    def open_data(self, config: Config, start: Start) -> OpenedT:
        """Open data and weights: whatever may fail by a mistake of the user.

        Raises:
            UserError: they are missing, or are not those of this configuration.
        """
        raise NotImplementedError

    def workload(self, config: Config, opened: OpenedT) -> Workload:
        """What training has to compute, for an image of the configured size."""
        raise NotImplementedError

    def distances(self, config: Config, opened: OpenedT, world: World) -> Distances | None:
        """What measures FID and its kin, if `train.evaluate_every` asks for them (collective).

        Raises:
            UserError: this stage makes no photographs, or something for it is missing.
        """
        if config.train.evaluate_every:
            raise UserError(
                "train.evaluate_every: FID is measured of photographs, and this model makes none: "
                "leave it out"
            )
        return None

    def recipe(self, config: Config, opened: OpenedT, context: Context) -> Recipe:
        """The recipe that trains with what was opened, once the ranks have met (collective)."""
        raise NotImplementedError


def part(value: object, kind: type[Part]) -> Part:
    """A part of a configuration as the class that its stage has there."""
    assert isinstance(value, kind), f"{type(value).__name__} instead of {kind.__name__}"
    return value
