"""The training loop: fetch, step, log, validate, save, stop. It knows a stage by `Recipe` only."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from taming_dist.cli import count
from taming_dist.engine.finding import read_state
from taming_dist.engine.meta import read_meta
from taming_dist.errors import UserError
from taming_dist.training.best import Best
from taming_dist.training.clock import Clock
from taming_dist.training.collapse import PERPLEXITY, USAGE, CollapseAlarm
from taming_dist.training.goodput import GOODPUT, RUNNING, Goodput, Past, read_past
from taming_dist.training.metrics import Means, prefixed, read, totals
from taming_dist.training.ranks import WAIT, Memory, beside_each_other
from taming_dist.training.run import Data, LoopConfig, Run
from taming_dist.training.saving import Saver, make_up_export
from taming_dist.training.signals import StopRequest
from taming_dist.training.sinks import Sinks
from taming_dist.training.skips import LATE, Skips, passes_over, sample_ranges
from taming_dist.training.stopping import Interrupted, Stopping
from taming_dist.training.timer import Timer
from taming_dist.training.validation import due_measurements, make_up, measure_each


@dataclasses.dataclass(frozen=True)
class End:
    """Why a run ended. `finished`: there is nothing left to do; else a signal has stopped it, or
    the end of a launcher, and with it of some ranks (`lost`)."""

    finished: bool
    reason: str
    best: Best
    goodput: Goodput
    lost: bool = False

    def without(self, orphans: list[bool]) -> "End":
        """The same, where the launchers of these ranks have ended before the run was finished: what
        is left of torchrun's nodes has to go on without them, so it must not look like success."""
        if self.finished or not any(orphans):
            return self
        reason = f"the launcher of rank {orphans.index(True)} has ended"
        return dataclasses.replace(self, reason=reason, lost=True)


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
    best, past = resume(run)
    best = make_up(run, best, stopping)
    batches = data.train.batches(from_sample=clock.images)
    skips = Skips(recipe.engines, data.train.keys, sinks, world)
    means, timer, alarm = Means(), Timer(run.speed), CollapseAlarm()
    memory = Memory(world.device)
    stopped = False  # asked or not, a start makes a step
    logging = saving = True  # there is nothing yet
    while not clock.finished and not stopped and not is_stale(best, config):
        micro_batches = fetch(run, batches, timer, stopping)
        if micro_batches is None:
            break
        progress.begin("in the step")
        train_step(run, micro_batches, skips, means)
        run.step_done()
        progress.steps += 1
        stopped = stopping()
        saver.tell()
        last = clock.finished or stopped
        saving = clock.due(config.checkpoint_every) or last
        logging = clock.due(config.log_every) or saving
        # A run that is asked to stop has no time for it: it is made up for at the next start.
        due = due_measurements(run) if clock.finished or not stopped else []
        skips.tell(late=0 if logging else LATE)
        timer.count(clock)  # now that the step before it, or this one, is over
        if logging:
            log(run, means, timer, memory, past, alarm)
        if saving:
            save(run, saver, best)
        # after the checkpoint, as they may take long
        if clock.finished or (clock.due(config.preview_every) and not stopped):
            progress.begin("drawing a preview")
            sinks.image(clock, recipe.preview(data.preview))
        if due:
            best = measure_each(run, due, best, stopping)
            stopped = stopping.agreed
        if logging or due:
            timer.restart()  # validation, previews and saving are not training time
    if not logging:
        log(run, means, timer, memory, past, alarm)
    if not saving:  # a validation or a wait for data was the end of it
        save(run, saver, best)
    saver.finish()
    goodput = past.until_now(timer.trained, run.began)
    return end_of(run, best, stopping, stop.name, goodput)


def fetch(run: Run, batches: Iterator[Any], timer: Timer, stopping: Stopping) -> list[Any] | None:
    """The micro-batches of the next step; None if ranks have left the wait for them to stop."""
    try:
        with timer.waiting(), run.progress.waiting("waiting for data", f"step {run.clock.step}"):
            return list(islice(batches, run.data.accumulation))
    except Interrupted:
        stopping.leave()
        return None


def log(
    run: Run, means: Means, timer: Timer, memory: Memory, past: Past, alarm: CollapseAlarm
) -> None:
    """Log what training was since the last time, and say so if its codebook collapses."""
    world, clock, sinks = run.world, run.clock, run.sinks
    found, ranks = means.take_beside(world, {WAIT: timer.waited} | memory.take())
    metrics = prefixed("train", found | run.recipe.window_metrics()) | beside_each_other(ranks)
    record = read(metrics | prefixed("data", totals(run.data.train.counts(), world)))
    goodput = past.until_now(timer.trained, run.began)
    spent = {GOODPUT: goodput.share, RUNNING: goodput.running_s}
    sinks.log(clock, record | prefixed("throughput", timer.take(clock)) | spent)
    if line := alarm.look(clock.step, record):
        usage, perplexity = record[USAGE], record[PERPLEXITY]
        sinks.event("collapse", clock, usage=usage, perplexity=perplexity)
        sinks.note(line)


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


def end_of(run: Run, best: Best, stopping: Stopping, signal: str | None, goodput: Goodput) -> End:
    """Why a run has ended: it is finished, or ranks have agreed to stop for a `signal` (None: one
    to another rank), or its models no longer get better."""
    if stopping.agreed:
        run.sinks.event("signal", run.clock, signal=signal)
    if run.clock.finished and not stopping.interrupted:
        return End(True, "finished", best, goodput)
    if stopping.agreed:
        return End(False, f"stopped by {signal or 'a signal to another rank'}", best, goodput)
    reason = f"no better {best.metric} in {best.since} validations (train.patience): best {best}"
    return End(True, reason, best, goodput)


def resume(run: Run) -> tuple[Best, Past]:
    """Continue from the newest valid checkpoint, if there is one; gives the best validation until
    then, and what it took."""
    clock, checkpoints, sinks = run.clock, run.checkpoints, run.sinks
    path = checkpoints.latest_valid(sinks.note)
    if path is None:
        past = read_past(sinks.run_dir, clock.images)
        sinks.rewind(clock)  # a run that died before its first checkpoint may have logged already
        sinks.event("start", clock, running_s=past.running_s, **resources(run))
        return Best(), past
    check_resumable(path, run.data, clock.global_batch, checkpoints.world.world_size)
    state = checkpoints.load(path, run.recipe.engines)
    clock.images = state["images"]
    run.recipe.load_state_dict(state["recipe"])
    make_up_export(run.recipe, run.export, run.world)
    past = read_past(sinks.run_dir, clock.images)
    sinks.rewind(clock)
    sinks.event("resume", clock, checkpoint=path.name, running_s=past.running_s, **resources(run))
    meta = read_meta(path)
    note_other_batch(clock, meta.step, sinks)
    note_other_ranks(meta.world_size, run)
    best = Best(**state.get("best", {}))
    known = run.criterion is not None and best.metric == run.criterion.metric
    return best if known else Best(), past


def resources(run: Run) -> dict[str, Any]:
    """What a start trains with: what a run costs is the sum of its starts, which may differ."""
    world = run.world
    return {
        "ranks": world.world_size,
        "device": world.device_name,
        "global_batch": run.clock.global_batch,
    }


def note_other_batch(clock: Clock, steps_then: int, sinks: Sinks) -> None:
    """Say what another global batch does to what is given in steps."""
    if steps_then and clock.images // steps_then != clock.global_batch:
        sinks.note(
            f"data.global_batch was {clock.images // steps_then} and is {clock.global_batch}: "
            f"{clock.images} images seen are step {clock.step} of {clock.total_steps} now; all "
            f"that is given in steps counts steps of {clock.global_batch} images"
        )


def note_other_ranks(ranks_then: int, run: Run) -> None:
    """Say what another number of ranks does."""
    ranks, cut = run.world.world_size, run.recipe.depends_on_the_cut()
    if ranks != ranks_then:
        run.sinks.note(
            f"resumed on {count(ranks, 'rank')}, saved on {ranks_then}: the samples of each step "
            f"are the same, and losses but for rounding{f', except that {cut}' if cut else ''}"
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
