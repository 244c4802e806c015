"""Validation within a run: when it is due, what it logs, and which of the models is the best."""

from collections.abc import Iterator
from typing import Any

from taming_dist.training.best import Best
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import prefixed
from taming_dist.training.recipe import Measured
from taming_dist.training.run import EvaluatedSource, LoopConfig, Run
from taming_dist.training.saving import keep_best
from taming_dist.training.stopping import Interrupted, Stopping


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
