"""The stages of training. `STAGES` is the only list of them; all else is derived from it."""

from collections import defaultdict
from typing import Any

from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.stages.context import Context
from taming_dist.stages.interface import Config, Opened, Stage, Start
from taming_dist.stages.label_maps import LabelMapStage
from taming_dist.stages.prior import PriorStage
from taming_dist.stages.vqgan import VQGANStage
from taming_dist.training.recipe import Recipe

__all__ = ["STAGES", "recipe_of", "schemas", "stage_of"]

STAGES: dict[str, Stage[Any]] = {
    "vqgan": VQGANStage(),
    "label_maps": LabelMapStage(),
    "transformer": PriorStage(),
}


def stage_of(config: Config) -> Stage[Any]:
    """The stage whose model, loss and data the configuration has.

    Raises:
        UserError: they are those of different stages.
    """
    parts = (type(config.model), type(config.loss), type(config.data))
    for stage in STAGES.values():
        fits = issubclass(parts[0], stage.model) and parts[1] is stage.loss
        if fits and parts[2] in stage.schemas["data"].values():
            return stage
    model, loss, data = (part.__name__ for part in parts)
    raise UserError(
        f"model={model} does not go with loss={loss} and data={data}: choose model, loss and data "
        f"of one stage, as the experiments do"
    )


def recipe_of(config: Config, start: Start, opened: Opened, world: World) -> Recipe:
    """What trains with what the stage has opened, once the ranks have met (collective)."""
    cut = (start.batch.micro_batch, start.batch.accumulation)
    seed, spikes, freeze = config.run.seed, config.train.skip_spikes, config.train.freeze
    context = Context(config.optim, config.engine, world, *cut, seed, spikes, freeze)
    return stage_of(config).recipe(config, opened, context)


def schemas() -> dict[str, dict[str, type]]:
    """The config classes of all stages, by config group and name."""
    found: dict[str, dict[str, type]] = defaultdict(dict)
    for stage in STAGES.values():
        for group, classes in stage.schemas.items():
            found[group] |= {f"{name}_schema": kind for name, kind in classes.items()}
    return dict(found)
