"""Entry point: measure an export on a data set.

python -m taming_dist.evaluate model=EXPORT data=SPEC out=DIR

A VQGAN is measured on image shards by the quality of its reconstructions, a transformer on code
shards by its predictions; the export says which of the two it is. <out> gets metrics.json last; for
a VQGAN, before that, reconstructions.png and single images as images/000-input.png and
images/000-reconstruction.png. Also under torchrun and srun, with the same figures. On Ctrl-C,
SIGTERM, SIGUSR1 or SIGHUP it ends without metrics.json, and the same command begins anew. See
docs/evaluation.md.
"""

import os
from pathlib import Path

import torch

from taming_dist.config import hydra_entry
from taming_dist.engine.outcome import forget_outcome, write_outcome
from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.world import World, choose_device, is_lost_connection
from taming_dist.errors import LostRank
from taming_dist.evaluation.config import EvaluateConfig
from taming_dist.evaluation.first_stage import evaluate_vqgan
from taming_dist.evaluation.second_stage import evaluate_transformer
from taming_dist.formats.files import writing
from taming_dist.formats.strict_json import write_json
from taming_dist.launch import Place, end_with_launcher, environment_place
from taming_dist.models.export import read_kind
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
            measure(config, join(here))
        except Stopped as stopped:
            if here.rank == 0:
                write_outcome(0, 0, finished=False, reason=f"stopped by {stopped}")
                said = "nothing is measured yet, and the same command begins anew"
                print(f"stopped by {stopped}: {said}")
        except Exception as error:
            if here.world_size > 1 and is_lost_connection(error):
                raise LostRank("another rank has ended: look at its error") from error
            raise


def join(here: Place) -> World:
    """The ranks that take part; a single process needs no group."""
    if here.world_size > 1:
        return init_world(here)
    return World(here.rank, 1, here.local_rank, choose_device(here.local_rank))


def measure(config: EvaluateConfig, world: World) -> None:
    """Measure, and have the first rank write the metrics to `config.out` (collective)."""
    evaluate = evaluate_vqgan if read_kind(config.model) == "vqgan" else evaluate_transformer
    path = Path(config.out) / "metrics.json"
    with writing(path.parent, "out="):
        with torch.inference_mode():
            measured = evaluate(config, world)
        if world.is_first:
            record = {"model": config.model, "data": config.data} | measured.record()
            write_json(path, record)
    if world.is_first:
        print("\n".join([*measured.lines(), f"wrote {path}"]))
    if world.world_size > 1:
        shutdown()


if __name__ == "__main__":
    end_with_launcher()
    # It would print a trace of its C++ for every connection that breaks: a line of ours says it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # in a folder of its own, where `model` and `data` are plain keys and not groups
    hydra_entry("evaluate", EvaluateConfig, main, folder=conf_dir() / "evaluate")
