"""What a run consists of: its configuration, its data, and what the training loop works with."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from taming_dist.data.plan import Plan
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.world import World
from taming_dist.losses.perceptual import WEIGHTS
from taming_dist.ranges import check_choice, check_ranges, ranged
from taming_dist.training.best import Criterion
from taming_dist.training.clock import Clock
from taming_dist.training.distances import Distances
from taming_dist.training.recipe import Recipe
from taming_dist.training.sinks import Sinks
from taming_dist.training.skips import sample_ranges
from taming_dist.training.watchdog import Progress
from taming_dist.training.workload import Speed

VALIDATION, EVALUATION = "val", "eval"  # the groups of metrics: what is best is of either


@dataclasses.dataclass
class LoopConfig:
    """Length and cadences in optimizer steps; 0 turns a cadence off.

    `validate_images`: validation covers at most so many images (or codes of images), evenly spread
    over data.val and the same each time; 0: all. With 2,000 the standard error of a mean is about a
    45th of the spread between images (LPIPS: 0.002), in a 25th of the time that ImageNet's 50,000
    take; taming_dist.evaluate covers all. `keep_last`, `keep_every`: see `Checkpoints`.

    `evaluate_every`: FID and its kin (eval/rfid of reconstructions, eval/fid of samples under the
    conditions of the validation set), by the validated images or, of samples, by
    `evaluate_reference`, given as `reference` of taming_dist.evaluate. `evaluate_features`:
    pretrained Inception weights, or random ones (tests only).

    `best`: the metric of validation whose best model is kept as run.dir/export-best, such as
    val/lpips or eval/fid; `auto`: the likelihood in stage 2, none in stage 1; null: none.
    `patience`: the run ends after so many of its measurements without a better one; 0: at `steps`.

    `stuck_after`: a rank that makes no progress for so many seconds ends the run with a line, and
    all ranks write the stacks of their threads (three times as long until the first step is done;
    0: never).

    `skip_spikes`: steps are skipped whose gradient's norm lies more than so many standard
    deviations above the mean of the 128 before (0: none; 6 is usual). `skip_samples`: ranges of
    samples in the order in which the run sees them, such as [120000-121000]: steps that have one of
    them are passed over without training.

    `freeze`: parts of the model that stay as they are in `run.init`. With [encoder,quantizer] the
    decoder learns on and the codes stay those that they were.

    `preview_guidance`: how far previews of a prior that can be guided are guided in a row of their
    own (`loss.condition_dropout`).
    """

    steps: int = ranged(100_000, at_least=1)
    log_every: int = ranged(50, at_least=0)
    checkpoint_every: int = ranged(5_000, at_least=0)
    validate_every: int = ranged(5_000, at_least=0)
    validate_images: int = ranged(2_000, at_least=0)
    evaluate_every: int = ranged(0, at_least=0)
    evaluate_features: str = "pretrained"
    evaluate_reference: Any = None
    preview_every: int = ranged(1_000, at_least=0)
    preview_images: int = ranged(8, at_least=1)
    preview_guidance: float = ranged(2.0, at_least=0)
    keep_last: int = ranged(2, at_least=1)
    keep_every: int = ranged(0, at_least=0)
    best: str | None = "auto"
    patience: int = ranged(0, at_least=0)
    stuck_after: float = ranged(600.0, at_least=0)
    skip_spikes: float = ranged(0.0, at_least=0)
    skip_samples: list[str] = dataclasses.field(default_factory=list)
    freeze: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        check_choice("train.evaluate_features", self.evaluate_features, WEIGHTS)
        sample_ranges(self.skip_samples)


class Position(Protocol):
    """Where a reader is in its data, after so many samples were consumed by all ranks."""

    def check_start(self, from_sample: int) -> Any: ...
    def state(self, samples: int) -> dict[str, Any]: ...
    def check_state(self, state: dict[str, Any]) -> None: ...


class Source(Protocol):
    """A reader of training batches, endless from a sample on (taming_dist/data)."""

    @property
    def plan(self) -> Position: ...
    def batches(self, from_sample: int) -> Iterator[Any]: ...
    def keys(self, batch: Any) -> list[str]: ...
    def counts(self) -> dict[str, int]: ...


class EvaluatedSource(Protocol):
    """A reader of each sample of a validation set once."""

    @property
    def plan(self) -> Plan: ...
    def epoch_batches(self) -> Iterator[Any]: ...


@dataclasses.dataclass
class Data:
    """Training and validation readers, the fixed preview batch, and how a step is cut."""

    train: Source
    val: EvaluatedSource
    val_batches: int
    preview: Any
    accumulation: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of: what is trained, on what, for how long, and where it is kept.

    `folder` (run.dir) gets the exports; `criterion`: which of the validated models is the best,
    None where that is not followed; `distances`: what measures FID, None where it is not asked for;
    `progress`: what the watchdog is told; `began`: when this
    start did, by time.monotonic(); `speed`: by what its speed is judged, None where nobody logs;
    `step_done` is called after each step.
    """

    recipe: Recipe
    data: Data
    clock: Clock
    config: LoopConfig
    checkpoints: Checkpoints
    sinks: Sinks
    world: World
    folder: Path
    criterion: Criterion | None = None
    distances: Distances | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)
    began: float = dataclasses.field(default_factory=time.monotonic)
    speed: Speed | None = None
    step_done: Callable[[], None] = lambda: None

    @property
    def export(self) -> Path:
        """The folder of the newest model."""
        return self.folder / "export"

    @property
    def best_export(self) -> Path:
        """The folder of the best model."""
        return self.folder / "export-best"
