"""Entry point: measure an export on a data set, or images against others.

python -m taming_dist.evaluate model=EXPORT data=SPEC out=DIR
python -m taming_dist.evaluate images=DIR reference=DIR out=DIR
python -m taming_dist.evaluate probe=true data=CODES train=CODES out=DIR

A VQGAN is measured on image shards by the quality of its reconstructions, a transformer on code
shards by its predictions, and by samples; the export says which of the two it is. Given images are
measured by their distance from a reference, a tokenizer by how well a transformer of a fixed recipe
learns its codes. <out> gets metrics.json last; for a VQGAN, before that, reconstructions.png and
single images as images/000-input.png and images/000-reconstruction.png.
Also under torchrun and srun, with the same figures. On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP it ends
without metrics.json, and the same command begins anew. See docs/evaluation.md.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from taming_dist.config import hydra_entry
from taming_dist.engine.outcome import forget_outcome, write_outcome
from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.world import World, choose_device, is_lost_connection
from taming_dist.errors import LostRank, UserError
from taming_dist.evaluation.config import EvaluateConfig, given
from taming_dist.evaluation.first_stage import evaluate_vqgan
from taming_dist.evaluation.image_sets import evaluate_images
from taming_dist.evaluation.protocol import Measured
from taming_dist.evaluation.second_stage import evaluate_transformer
from taming_dist.formats.code_shards import CLASSES
from taming_dist.formats.files import writing
from taming_dist.formats.strict_json import write_json
from taming_dist.generation.decoding import DecodingKeys
from taming_dist.generation.generator import Generator
from taming_dist.launch import Place, end_with_launcher, environment_place
from taming_dist.models.export import read_kind
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.probe import SIZES, run_probe
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.plan import plan_of
from taming_dist.sampling.recipe import recipe_of
from taming_dist.sampling.stream import Sampled
from taming_dist.usage import conf_dir


def main(config: EvaluateConfig) -> None:
    """Measure and write the metrics to `config.out`, unless this process is asked to stop.

    Raises:
        UserError: an export, shards, settings or a folder that cannot be used.
        LostRank: another rank ended before the figures were put together.
    """
    here = environment_place()
    if here.rank == 0:
        forget_outcome()
    with stoppable():
        try:
            measure(config, join(here, trains=config.probe))
        except Stopped as stopped:
            if here.rank == 0:
                write_outcome(0, 0, finished=False, reason=f"stopped by {stopped}")
                said = "nothing is measured yet, and the same command begins anew"
                print(f"stopped by {stopped}: {said}")
        except Exception as error:
            if here.world_size > 1 and is_lost_connection(error):
                raise LostRank("another rank has ended: look at its error") from error
            raise


def join(here: Place, trains: bool = False) -> World:
    """The ranks that take part; a single process needs no group unless it `trains`."""
    if here.world_size > 1 or trains:
        return init_world(here)
    return World(here.rank, 1, here.local_rank, choose_device(here.local_rank))


def measure(config: EvaluateConfig, world: World) -> None:
    """Measure, and have the first rank write the metrics to `config.out` (collective)."""
    evaluate = evaluation_of(config)
    path = Path(config.out) / "metrics.json"
    with writing(path.parent, "out="):
        with torch.inference_mode():
            measured = evaluate(config, world)
        if world.is_first:
            write_json(path, asked_for(config) | measured.record())
    if world.is_first:
        print("\n".join([*measured.lines(), f"wrote {path}"]))
    shutdown()


def asked_for(config: EvaluateConfig) -> dict[str, Any]:
    """What the command names, for metrics.json."""
    names = ("model", "data", "train", "vqgan", "reference", "training")
    asked = {name: getattr(config, name) for name in names}
    asked["source"] = config.images  # whose number is called so
    if config.n is not None:
        asked["sampling"] = vars(DecodingKeys.of(config))
    return {name: value for name, value in asked.items() if value}


def evaluation_of(config: EvaluateConfig) -> Callable[[EvaluateConfig, World], Measured]:
    """What measures what the command names.

    Raises:
        UserError: it names nothing.
    """
    if config.probe:
        return partial(run_probe, sampling=sampled_images)
    for name in given(config):
        if name == "train" or name in SIZES:
            raise UserError(f"{name}: it is for probe=true, leave it out")
    if config.images is not None:
        return evaluate_images
    if not config.model or not config.data:
        name = "data" if config.model else "model"
        raise UserError(
            f"{name}=... is missing: give model=EXPORT data=SHARDS, or images=... reference=..., "
            f"or probe=true"
        )
    if read_kind(config.model) == "vqgan":
        return evaluate_vqgan
    return partial(evaluate_transformer, sampling=sampled_images)


def sampled_images(config: EvaluateConfig, transformer: Transformer, world: World) -> Sampled:
    """The images that the sampling command would make. A condition that is read from code shards is
    that of the codes which the transformer is measured on, unless another is given.

    Raises:
        UserError: settings that the models cannot serve.
    """
    if not config.vqgan:
        raise UserError("vqgan=... is missing: the export that decodes the codes of the samples")
    settings = vars(DecodingKeys.of(config))
    if config.condition is None and set(transformer.condition.columns) - {CLASSES}:
        settings["condition"] = config.data
    asked = SampleConfig(
        transformer=config.model,
        vqgan=config.vqgan,
        out=config.out,
        n=config.n,
        batch=config.batch,
        **settings,
    )
    vqgan = VQGAN.from_pretrained(config.vqgan).to(world.device)
    plan = plan_of(asked, Generator(transformer, vqgan, config.precision))
    return Sampled(plan, recipe_of(asked, plan))


if __name__ == "__main__":
    end_with_launcher()
    # It would print a trace of its C++ for every connection that breaks: a line of ours says it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # in a folder of its own, where `model` and `data` are plain keys and not groups
    hydra_entry("evaluate", EvaluateConfig, main, folder=conf_dir() / "evaluate")
