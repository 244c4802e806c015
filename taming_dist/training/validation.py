"""Measuring a model within its run: what of it is due, what is logged, and which is the best."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from taming_dist.training.best import Best
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import prefixed
from taming_dist.training.recipe import Measured
from taming_dist.training.run import EVALUATION, VALIDATION, EvaluatedSource, Run
from taming_dist.training.saving import keep_best
from taming_dist.training.stopping import Interrupted, Stopping


@dataclass(frozen=True)
class Measurement:
    """Something that is measured `every` so many steps and at the end, 0: only there. Its metrics
    are those of a `group`; `measure` finds them by batches of the validation set, each with whether
    it counts (collective); `called`: what it is to the reader of a note."""

    group: str
    every: int
    called: str
    measure: Callable[[Iterable[tuple[Any, bool]]], Measured]

    def due(self, clock: Clock) -> bool:
        """Whether the present step is one after which this is measured."""
        return clock.images > 0 and (clock.due(self.every) or clock.finished)

    def decides(self, run: Run) -> bool:
        """Whether the best model is chosen by one of its metrics."""
        return run.criterion is not None and run.criterion.group == self.group


def measurements(run: Run) -> Iterator[Measurement]:
    """What this run measures, in this order."""
    config, distances = run.config, run.distances
    validate = run.recipe.validate
    yield Measurement(VALIDATION, config.validate_every, "validation", validate)
    if distances is not None:

        def compare(batches: Iterable[tuple[Any, bool]]) -> Measured:
            return distances.measure(run.recipe.pictures(batches), run.world, run.progress)

        yield Measurement(EVALUATION, config.evaluate_every, "evaluation", compare)


def due_measurements(run: Run) -> list[Measurement]:
    """Those that are due at the present step."""
    return [each for each in measurements(run) if each.due(run.clock)]


def measure_each(run: Run, due: Iterable[Measurement], best: Best, stopping: Stopping) -> Best:
    """Measure what is due, until a signal asks to stop; gives the best."""
    for measurement in due:
        if stopping.agreed:
            break
        best = measure(run, measurement, best, stopping)
    return best


def measure(run: Run, measurement: Measurement, best: Best, stopping: Stopping) -> Best:
    """Log the metrics of the present step on the validation set, and keep its model if it is the
    best so far; gives the best. Nothing is kept of what a signal interrupts: the next start makes
    up for it."""
    data, clock, called = run.data, run.clock, measurement.called
    batches = in_step(data.val, data.val_batches, data.preview)
    try:
        metrics = measurement.measure(stopping.each(run.progress.each(called, batches)))
    except Interrupted:
        if not stopping.agreed:
            stopping.leave()
        run.sinks.note(f"the {called} of step {clock.step} was interrupted")
        return best
    if measurement.decides(run) and run.criterion is not None:
        run.criterion.check(metrics)
        best = compare(run, best, metrics)
    # last: a run that is killed before does all of it again
    run.sinks.log(clock, prefixed(measurement.group, metrics))
    return best


def compare(run: Run, best: Best, metrics: Measured) -> Best:
    """Export the model if these metrics of it are the best so far; gives the best."""
    assert run.criterion is not None, "there is nothing to compare by"
    # the first rank's, so that all ranks stop together
    value = run.world.broadcast(run.criterion.of(metrics))
    best = best.after(run.criterion, run.clock.images, value)
    if best.is_at(run.clock.images):
        run.progress.begin("exporting")
        keep_best(run.recipe.export(), run.best_export, run.sinks, run.clock)
        run.sinks.event("best", run.clock, metric=best.metric, value=best.value)
    return best


def make_up(run: Run, best: Best, stopping: Stopping) -> Best:
    """Measure what of the resumed step is due and was not logged before the run ended; gives the
    best. (A checkpoint is older than the measurements that follow it.)"""
    for measurement in due_measurements(run):
        decides = measurement.decides(run)
        if stopping.agreed or (decides and best.newest == run.clock.images):
            continue
        logged = run.world.broadcast(run.sinks.logged(run.clock, measurement.group))
        if logged is None:
            called = measurement.called
            run.sinks.note(f"step {run.clock.step} has no {called} yet: that comes first")
            best = measure(run, measurement, best, stopping)
        elif decides:
            best = compare(run, best, logged)
    return best


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
