"""Train either stage: `python -m taming_dist.train +experiment=NAME [key=value ...]`.

Composes configuration, data, recipe and loop; computes nothing itself. The same command starts a
run and resumes it, alone, under torchrun, or as one srun task per GPU.
"""

import dataclasses
import os
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from taming_dist.launch import end_with_launcher
from taming_dist.memory import collect_from_now_on, start_without_collecting
from taming_dist.training.signals import StopRequest
from taming_dist.usage import usage

if TYPE_CHECKING:
    from taming_dist.engine.world import World
    from taming_dist.stages.interface import Config, Opened, Start
    from taming_dist.training.best import Criterion
    from taming_dist.training.loop import End
    from taming_dist.training.run import Run
    from taming_dist.training.workload import Speed

BEGAN = time.monotonic()


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(), end="")
        return
    start_without_collecting()
    # Before torch is imported, which takes seconds in which a signal would kill the process.
    stop = StopRequest().install()
    end_with_launcher()
    # It would print a trace of its C++ for every connection that breaks: a line of ours says it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from taming_dist.config import hydra_entry
    from taming_dist.stages import schemas
    from taming_dist.stages.interface import Config

    hydra_entry("train", Config, lambda config: train(config, stop), schemas())
    if stop.abandons:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(0)


def train(config: "Config", stop: StopRequest) -> None:
    """Check everything, then train; or, with `dry_run`, only tell what the run would be."""
    from taming_dist.cli import EXIT_AGAIN
    from taming_dist.config import check
    from taming_dist.dry_run import dry_run, is_dry
    from taming_dist.engine.finding import newest_valid
    from taming_dist.engine.outcome import forget_outcome
    from taming_dist.engine.start import init_world, load_deepspeed, shutdown
    from taming_dist.launch import environment_place
    from taming_dist.run_dir import check_run_dir
    from taming_dist.stages import stage_of
    from taming_dist.stages.interface import Start
    from taming_dist.training.leftovers import remove_leftovers
    from taming_dist.training.lock import locked_for_all
    from taming_dist.training.loop import check_resumable

    here = environment_place()
    if is_dry(config):
        if here.rank == 0:
            print(dry_run(config, here.world_size))
        return
    batch = check(config, here.world_size)
    run_dir = Path(config.run.dir)
    check_run_dir(config, run_dir)
    stage = stage_of(config)
    criterion = stage.criterion(config)
    found = newest_valid(run_dir / "checkpoints", report=lambda _: None)
    start = Start(here, batch, run_dir, "" if found else config.run.init)
    opened = stage.open_data(config, start)
    if found is not None:
        check_resumable(found, opened.data, config.data.global_batch, here.world_size)

    if here.rank == 0:
        forget_outcome()
    load_deepspeed()  # takes seconds, in which a signal is remembered
    with ExitStack() as stack:
        with stop.suspended():
            world = init_world(here, config.engine.allowed_tf32, config.engine.deterministic)
            stack.enter_context(locked_for_all(run_dir, world))
        if world.is_first:
            remove_leftovers(run_dir)
        end = fit_stage(config, start, opened, criterion, world, stop)
    shutdown()
    if end.lost:
        sys.exit(EXIT_AGAIN)


def fit_stage(
    config: "Config",
    start: "Start",
    opened: "Opened",
    criterion: "Criterion | None",
    world: "World",
    stop: StopRequest,
) -> "End":
    """Build the stage, and run the loop; gives why it ended."""
    from taming_dist.description import describe
    from taming_dist.engine.checkpoint import Checkpoints
    from taming_dist.engine.outcome import write_outcome
    from taming_dist.lineage import export, read_by
    from taming_dist.run_dir import first_rank_sinks
    from taming_dist.stages import recipe_of, stage_of
    from taming_dist.training.clock import Clock
    from taming_dist.training.ending import ending, tell
    from taming_dist.training.export import is_exported
    from taming_dist.training.loop import fit
    from taming_dist.training.profiling import profiled
    from taming_dist.training.run import Run
    from taming_dist.training.sinks import Sinks
    from taming_dist.training.watchdog import watching

    run_dir = start.run_dir
    clock = Clock(config.data.global_batch, config.train.steps)
    stuck_after = config.train.stuck_after
    with (
        ending(run_dir, world, clock) as stack,
        watching(run_dir, world, clock, stuck_after, stop) as progress,
    ):
        recipe = recipe_of(config, start, opened, world)
        distances = stage_of(config).distances(config, opened, world)
        sinks = Sinks(None, [])
        if world.is_first:
            sinks = stack.enter_context(first_rank_sinks(config, clock, run_dir))
            stop.last_words = partial(tell, run_dir, world, clock)
        speed = speed_of(config, opened, world) if world.is_first else None
        sinks.note(describe(config, world, start.batch, recipe))
        sinks.note(f"work      {speed}")
        for read in read_by(config):
            sinks.artifact(read, made=False)
        checkpoints = Checkpoints(
            run_dir / "checkpoints", world, config.train.keep_last, config.train.keep_every
        )
        run = Run(
            recipe=recipe,
            data=opened.data,
            clock=clock,
            config=config.train,
            checkpoints=checkpoints,
            sinks=sinks,
            world=world,
            folder=run_dir,
            criterion=criterion,
            distances=distances,
            progress=progress,
            began=BEGAN,
            speed=speed,
            step_done=stack.enter_context(profiled(config.debug, run_dir, world, sinks.note)),
        )
        collect_from_now_on()
        end = fit(run, stop).without(world.gather(stop.is_orphan))
        stop.last_words = None
        if end.finished:
            for folder in filter(is_exported, (run.export, run.best_export)):
                sinks.artifact(partial(export, folder), made=True)
        told = dataclasses.asdict(end.goodput) | {"goodput": end.goodput.share}
        sinks.event("exit", clock, finished=end.finished, reason=end.reason, **told)
        if world.is_first:
            write_outcome(clock.step, clock.images, end.finished, end.reason)
    sinks.note(farewell(run, end))
    return end


def speed_of(config: "Config", opened: "Opened", world: "World") -> "Speed":
    """By what the speed of this run is judged."""
    from taming_dist.engine.peak import peak_of
    from taming_dist.stages import stage_of
    from taming_dist.training.workload import Speed

    workload = stage_of(config).workload(config, opened)
    return Speed(workload, peak_of(world.device, config.engine), world.world_size)


def farewell(run: "Run", end: "End") -> str:
    """Where a run stands, and where its models are."""
    at = f"stopped at step {run.clock.step} of {run.clock.total_steps}"
    if not end.finished:
        return f"{at}: the same command resumes from here ({end.goodput})"
    why = "" if run.clock.finished else f" ({end.reason})"
    best = f", the best ({end.best}) in {run.best_export}" if end.best.metric else ""
    return f"{at}{why}: the trained model is in {run.export}{best} ({end.goodput})"


if __name__ == "__main__":
    main()
