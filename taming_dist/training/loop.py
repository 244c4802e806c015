"""The training loop: fetch, step, log, validate, save, stop. It knows a stage by `Recipe` only."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from taming_dist.data.plan import Plan
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.finding import read_state
from taming_dist.engine.meta import read_meta
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, ranged
from taming_dist.training.best import Best, Criterion
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means, read, totals
from taming_dist.training.recipe import Measured, Recipe
from taming_dist.training.saving import Saver, keep_best, make_up_export
from taming_dist.training.signals import StopRequest
from taming_dist.training.sinks import Sinks
from taming_dist.training.skips import LATE, Skips, passes_over, sample_ranges
from taming_dist.training.stopping import Interrupted, Stopping
from taming_dist.training.timer import Timer
from taming_dist.training.watchdog import Progress

Number = TypeVar("Number")


@dataclasses.dataclass
class LoopConfig:
    """Length and cadences in optimizer steps; 0 turns a cadence off.

    `validate_images`: validation covers at most so many images (or codes of images), evenly spread
    over data.val and the same each time; 0: all. With 2,000 the standard error of a mean is about a
    45th of the spread between images (LPIPS: 0.002), in a 25th of the time that ImageNet's 50,000
    take; taming_dist.evaluate covers all. `keep_last`, `keep_every`: see `Checkpoints`.

    `best`: the metric of validation whose best model is kept as run.dir/export-best, such as
    val/lpips; `auto`: the likelihood in stage 2, none in stage 1; null: none. `patience`: the run
    ends after so many validations without a better one; 0: at `steps`.

    `stuck_after`: a rank that makes no progress for so many seconds ends the run with a line, and
    all ranks write the stacks of their threads (three times as long until the first step is done;
    0: never).

    `skip_spikes`: steps are skipped whose gradient's norm lies more than so many standard
    deviations above the mean of the 128 before (0: none; 6 is usual). `skip_samples`: ranges of
    samples in the order in which the run sees them, such as [120000-121000]: steps that have one of
    them are passed over without training.

    `preview_guidance`: how far previews of a prior that can be guided are guided in a row of their
    own (`loss.condition_dropout`).
    """

    steps: int = ranged(100_000, at_least=1)
    log_every: int = ranged(50, at_least=0)
    checkpoint_every: int = ranged(5_000, at_least=0)
    validate_every: int = ranged(5_000, at_least=0)
    validate_images: int = ranged(2_000, at_least=0)
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

    def __post_init__(self) -> None:
        check_ranges(self, "train")
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
    None where that is not followed; `progress`: what the watchdog is told.
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
    progress: Progress = dataclasses.field(default_factory=Progress)

    @property
    def export(self) -> Path:
        """The folder of the newest model."""
        return self.folder / "export"

    @property
    def best_export(self) -> Path:
        """The folder of the best model."""
        return self.folder / "export-best"


@dataclasses.dataclass(frozen=True)
class End:
    """Why a run ended. `finished`: there is nothing left to do; else a signal has stopped it."""

    finished: bool
    reason: str
    best: Best


def fit(run: Run, stop: StopRequest) -> End:
    """Train to the end of the clock, or until a signal asks to stop, or until there was no better
    model for as many validations as `train.patience` says."""
    with Saver(run.checkpoints, run.export, run.sinks, run.progress, run.world) as saver:
        return steps(run, stop, saver)


def steps(run: Run, stop: StopRequest, saver: Saver) -> End:
    """Every step of a run: fetch, step, log, preview, save, validate."""
    recipe, data, clock, config = run.recipe, run.data, run.clock, run.config
    sinks, world, progress = run.sinks, run.world, run.progress
    stopping = Stopping(stop, world)
    best = make_up_validation(run, resume(run), stopping)
    batches = data.train.batches(from_sample=clock.images)
    skips = Skips(recipe.engines, data.train.keys, sinks, world)
    means, timer, stopped = Means(), Timer(), False  # asked or not, a start makes a step
    logging = saving = True  # there is nothing yet
    while not clock.finished and not stopped and not is_stale(best, config):
        micro_batches = fetch(run, batches, timer, stopping)
        if micro_batches is None:
            break
        progress.begin("in the step")
        train_step(run, micro_batches, skips, means)
        progress.steps += 1
        timer.count(clock.global_batch)
        stopped = stopping()
        saver.tell()
        last = clock.finished or stopped
        saving = clock.due(config.checkpoint_every) or last
        logging = clock.due(config.log_every) or saving
        # A run that is asked to stop has no time for it: it is made up for at the next start.
        validating = clock.finished or (validation_due(clock, config) and not stopped)
        skips.tell(late=0 if logging else LATE)
        if logging:
            log(run, means, timer)
        if saving:
            save(run, saver, best)
        # after the checkpoint, as they may take long
        if clock.finished or (clock.due(config.preview_every) and not stopped):
            progress.begin("drawing a preview")
            sinks.image(clock, recipe.preview(data.preview))
        if validating:
            best = validate(run, best, stopping)
            stopped = stopping.agreed
        if logging or validating:
            timer.restart()  # validation, previews and saving are not training time
    if not logging:
        log(run, means, timer)
    if not saving:  # a validation or a wait for data was the end of it
        save(run, saver, best)
    saver.finish()
    return end_of(run, best, stopping, stop.name)


def fetch(run: Run, batches: Iterator[Any], timer: Timer, stopping: Stopping) -> list[Any] | None:
    """The micro-batches of the next step; None if ranks have left the wait for them to stop."""
    try:
        with timer.waiting(), run.progress.waiting("waiting for data", f"step {run.clock.step}"):
            return list(islice(batches, run.data.accumulation))
    except Interrupted:
        stopping.leave()
        return None


def log(run: Run, means: Means, timer: Timer) -> None:
    """Log what training was since the last time."""
    world = run.world
    metrics = prefixed("train", means.take(world) | run.recipe.window_metrics())
    record = read(metrics | prefixed("data", totals(run.data.train.counts(), world)))
    run.sinks.log(run.clock, record | prefixed("throughput", timer.take()))


def train_step(run: Run, micro_batches: list[Any], skips: Skips, means: Means) -> None:
    """Make an optimizer step, or pass over it where train.skip_samples says so."""
    recipe, clock = run.recipe, run.clock
    if passes_over(sample_ranges(run.config.skip_samples), clock):
        clock.tick()
        skips.pass_over(clock)
        return
    parts = list(recipe.train_step(micro_batches, clock))
    clock.tick()
    means.add_all(parts, skips.add(clock, micro_batches, parts))


def is_stale(best: Best, config: LoopConfig) -> bool:
    """Whether so many validations without a better one have followed the best that it is enough."""
    return 0 < config.patience <= best.since


def end_of(run: Run, best: Best, stopping: Stopping, signal: str | None) -> End:
    """Why a run has ended: it is finished, or ranks have agreed to stop for a `signal` (None: one
    to another rank), or its models no longer get better."""
    if stopping.agreed:
        run.sinks.event("signal", run.clock, signal=signal)
    if run.clock.finished and not stopping.interrupted:
        return End(True, "finished", best)
    if stopping.agreed:
        return End(False, f"stopped by {signal or 'a signal to another rank'}", best)
    reason = f"no better {best.metric} in {best.since} validations (train.patience): best {best}"
    return End(True, reason, best)


def resume(run: Run) -> Best:
    """Continue from the newest valid checkpoint, if there is one; gives the best validation until
    then."""
    clock, checkpoints, sinks = run.clock, run.checkpoints, run.sinks
    path = checkpoints.latest_valid(sinks.note)
    if path is None:
        sinks.rewind(clock)  # a run that died before its first checkpoint may have logged already
        sinks.event("start", clock)
        return Best()
    check_resumable(path, run.data, clock.global_batch, checkpoints.world.world_size)
    state = checkpoints.load(path, run.recipe.engines)
    clock.images = state["images"]
    run.recipe.load_state_dict(state["recipe"])
    make_up_export(run.recipe, run.export, run.world)
    sinks.rewind(clock)
    sinks.event("resume", clock, checkpoint=path.name)
    note_other_batch(clock, read_meta(path).step, sinks)
    best = Best(**state.get("best", {}))
    known = run.criterion is not None and best.metric == run.criterion.metric
    return best if known else Best()


def validation_due(clock: Clock, config: LoopConfig) -> bool:
    """Whether the present step is one after which the model is validated."""
    return clock.images > 0 and (clock.due(config.validate_every) or clock.finished)


def validate(run: Run, best: Best, stopping: Stopping) -> Best:
    """Log the metrics of the present step on the validation set, and keep its model if it is the
    best so far; gives the best. Nothing is kept of a validation that a signal interrupts: the next
    start makes up for it."""
    data, clock = run.data, run.clock
    batches = in_step(data.val, data.val_batches, data.preview)
    try:
        metrics = run.recipe.validate(stopping.each(run.progress.each("validating", batches)))
    except Interrupted:
        if not stopping.agreed:
            stopping.leave()
        run.sinks.note(f"the validation of step {clock.step} was interrupted")
        return best
    if run.criterion is not None:
        run.criterion.check(metrics)
    best = compare(run, best, metrics)
    # last: a run that is killed before does all of it again
    run.sinks.log(clock, prefixed("val", metrics))
    return best


def compare(run: Run, best: Best, metrics: Measured) -> Best:
    """Export the model if these metrics of it are the best so far; gives the best."""
    if run.criterion is None:
        return best
    # the first rank's, so that all ranks stop together
    value = run.world.broadcast(run.criterion.of(metrics))
    best = best.after(run.criterion, run.clock.images, value)
    if best.is_at(run.clock.images):
        run.progress.begin("exporting")
        keep_best(run.recipe.export(), run.best_export, run.sinks, run.clock)
        run.sinks.event("best", run.clock, metric=best.metric, value=best.value)
    return best


def make_up_validation(run: Run, best: Best, stopping: Stopping) -> Best:
    """Validate the resumed step if that is due and the run ended before it was logged; gives the
    best. (A checkpoint is older than the validation that follows it.)"""
    if not validation_due(run.clock, run.config) or best.newest == run.clock.images:
        return best
    logged = run.world.broadcast(run.sinks.logged(run.clock, "val"))
    if logged is not None:
        return compare(run, best, logged)
    run.sinks.note(f"step {run.clock.step} was not validated yet: that comes first")
    return validate(run, best, stopping)


def note_other_batch(clock: Clock, steps_then: int, sinks: Sinks) -> None:
    """Say what another global batch does to what is given in steps."""
    if steps_then and clock.images // steps_then != clock.global_batch:
        sinks.note(
            f"data.global_batch was {clock.images // steps_then} and is {clock.global_batch}: "
            f"{clock.images} images seen are step {clock.step} of {clock.total_steps} now; all "
            f"that is given in steps counts steps of {clock.global_batch} images"
        )


def check_resumable(path: Path, data: Data, global_batch: int, world_size: int) -> None:
    """UserError if this run cannot go on from the checkpoint: known before any process starts."""
    state = read_state(path, world_size)
    data.train.plan.check_state(state["data"])
    images = state["images"]
    if images % global_batch:
        raise UserError(
            f"data.global_batch={global_batch} does not divide the {images} images seen by {path}: "
            f"set it back, or choose another run.name"
        )


def save(run: Run, saver: Saver, best: Best) -> None:
    """Begin to write the model, then a checkpoint: weights and optimizers by the engines, the rest
    as plain JSON. (A run that is killed between the two repeats both.)"""
    clock, recipe = run.clock, run.recipe
    state = {
        "images": clock.images,
        "data": run.data.train.plan.state(clock.images),
        "recipe": recipe.state_dict(),
    }
    if best.metric:
        state["best"] = best.state()
    saver.save(clock, recipe, state)


def in_step(val: EvaluatedSource, count: int, spare: Any) -> Iterator[tuple[Any, bool]]:
    """The validation batches, `count` on every rank: at ZeRO-3 all ranks must run alike, so a rank
    that has fewer goes over its last batch again, without counting it; over the `spare` one if it
    can read none of its own."""
    batch = spare
    batches = val.epoch_batches()
    for _ in range(count):
        fresh = next(batches, None)
        batch = batch if fresh is None else fresh
        yield batch, fresh is not None


def prefixed(prefix: str, values: Mapping[str, Number]) -> dict[str, Number]:
    """{"rec": 1.0} -> {"train/rec": 1.0}."""
    return {f"{prefix}/{name}": value for name, value in values.items()}
